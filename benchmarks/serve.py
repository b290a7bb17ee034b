"""Requests a server answers: `weft serve` over HTTP against llama.cpp and transformers called directly, on the same model, in turns.

    python benchmarks/serve.py                     SmolLM2-135M (weft pull smollm2-135m); some minutes on two cores
    python benchmarks/serve.py --rounds 1 --quick  whether it runs

One request, then sixteen at once, each a prompt of 256 tokens and 64 more: tokens written a second from the first request sent to the last
token there, reading of prompts included. The peers have no HTTP to go through, and llama.cpp takes part where `llama_cpp` can be imported.
The last line is one JSON object.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from decode import peers, prompts
from race import compare, machine, publish, tell

STREAMS, PROMPT, NEW = 16, 256, 64


class Server:
    """`weft serve` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        from weft.tokenizer import load_tokenizer
        from weft.weights.hub import find_model

        command = [sys.executable, "-m", "weft.cli.main", "serve", "smollm2-135m", "--port", "0", "--json"]
        self.never_end = {str(index): -100 for index in load_tokenizer(find_model("smollm2-135m")).eos_ids}
        self._log = (folder / "serve.log").open("w")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        self.address = json.loads(self._process.stdout.readline())["address"]

    def answer(self, rows: list[list[int]], new: int) -> float:
        """Seconds until every one of these prompts, sent at once, has its `new` tokens."""
        return asyncio.run(self._answer(rows, new))

    async def _answer(self, rows: list[list[int]], new: int) -> float:
        import httpx

        async with httpx.AsyncClient(base_url=self.address, timeout=600) as client:
            start = time.perf_counter()
            counts = await asyncio.gather(*(self._stream(client, ids, new) for ids in rows))
            seconds = time.perf_counter() - start
        if set(counts) != {new}:
            raise RuntimeError(f"asked for {new} tokens a stream, got {sorted(set(counts))}")
        return seconds

    async def _stream(self, client: Any, ids: list[int], new: int) -> int:
        body = {"model": "smollm2-135m", "prompt": ids, "max_tokens": new, "temperature": 0, "logit_bias": self.never_end, "stream": True}
        tokens = 0
        async with client.stream("POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    usage = json.loads(line[6:]).get("usage")
                    tokens = usage["completion_tokens"] if usage else tokens
        return tokens

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few tokens, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    new = 4 if options.quick else NEW
    facts = machine("transformers", "llama-cpp-python")
    with tempfile.TemporaryDirectory() as temporary:
        racers = peers(Path(temporary))
        server = Server(Path(temporary))
        names = ["weft serve", *(racer.name for racer in racers)]
        found: dict[str, dict[int, list[float]]] = {name: {1: [], STREAMS: []} for name in names}
        for number in range(-1, options.rounds):  # the first one only warms up
            for streams in (1, STREAMS):
                rows = prompts(10 * number + streams, streams, PROMPT)
                for name in random.sample(names, len(names)):
                    if name == "weft serve":
                        seconds = server.answer(rows, new)
                    else:
                        racer = next(racer for racer in racers if racer.name == name)
                        start = time.perf_counter()
                        racer.ask(rows, new)
                        seconds = time.perf_counter() - start
                    if number >= 0:
                        found[name][streams].append(streams * new / seconds)
            tell(f"round {number + 1} of {options.rounds}")
        server.stop()
        for racer in racers:
            racer.leave()
    rows = compare({name: {str(streams): values for streams, values in speeds.items()} for name, speeds in found.items()}, "weft serve")
    publish({"benchmark": "serve", "machine": facts, "rounds": options.rounds, "contestants": rows}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
