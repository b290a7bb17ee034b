"""A server in a process of its own, over a small model with random weights, and what tests say to it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from generation_cases import STORY, TEMPLATE

from weft.nn import build
from weft.spec import model_spec
from weft.tokenizer import load_tokenizer
from weft.tokenizer.train import train_tokenizer
from weft.weights.save import save_model

JSON_TEXT = '{"name": "fox", "count": 3, "arguments": {"city": "Paris"}}\n<tool_call>\n</tool_call>\n'


def make_model(folder: Path, chat: bool = True, context: int = 1024, seed: int = 2) -> Path:
    """A Llama-shaped model with random weights, whose tokenizer has pieces of JSON."""
    tokenizer = train_tokenizer("bpe", [STORY + JSON_TEXT * 20], 340)
    if chat:
        tokenizer.settings = replace(tokenizer.settings, chat_templates={"default": TEMPLATE})
    layer = {"repeat": 2, "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 64}}
    sizes = {"vocab": tokenizer.vocab_size, "dim": 32, "context": context, "init_std": 0.3, "tie_embeddings": False}
    return save_model(build(model_spec({**sizes, "norm": {"type": "rms"}, "layers": [layer]}), seed=seed), folder, tokenizer)


class Server:
    """A `weft serve` that is ready; `url` is its address."""

    def __init__(self, *arguments: Any, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "weft.cli.main", "serve", *map(str, arguments), "--port", "0", "--json"]
        settings = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)
        self.errors: list[str] = []
        self.told = False
        threading.Thread(target=self._read_errors, daemon=True).start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "".join(self.errors)
        self.ready = json.loads(line)
        self.url = self.ready["address"]
        self.model = self.ready["models"][0]

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors += iter(self.process.stderr.readline, "")

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **settings)

    def chat(self, client: httpx.Client, text: str = "the quick", **fields: Any) -> httpx.Response:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
        return client.post("/v1/chat/completions", json=body | fields)

    def stream(self, client: httpx.Client, text: str = "the quick", **fields: Any) -> Any:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "stream": True}
        return client.stream("POST", "/v1/chat/completions", json=body | fields)

    def metric(self, name: str) -> float:
        """The sum of a figure over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def tell(self, number: int) -> None:
        """Send a signal, the first of which tells it to stop."""
        self.told = True
        self.process.send_signal(number)

    def stop(self) -> tuple[int, dict[str, Any]]:
        """Tell it to stop, unless it was told; its exit code, and what it said last."""
        if not self.told:
            self.tell(signal.SIGTERM)
        assert self.process.stdout is not None
        said = self.process.stdout.read().splitlines()
        return self.process.wait(timeout=60), json.loads(said[-1]) if said else {}


@contextmanager
def serving(*arguments: Any, environment: dict[str, str] | None = None, end: int = signal.SIGTERM) -> Iterator[Server]:
    """A server, stopped by a signal at the end; it must then leave with exit code 0 and without a traceback."""
    server = Server(*arguments, environment=environment)
    try:
        yield server
    except BaseException:
        server.process.kill()
        server.process.wait()
        raise
    server.tell(end)
    code, _ = server.stop()
    assert code == 0, "".join(server.errors)
    assert "Traceback" not in "".join(server.errors), "".join(server.errors)


def endless(folder: Path) -> dict[str, Any]:
    """Fields of a request that goes on to the end of the context."""
    ends = load_tokenizer(folder).eos_ids
    return {"logit_bias": {str(token): -100 for token in ends}, "max_tokens": None}


def events(response: httpx.Response) -> list[Any]:
    """What a stream of server-sent events says, the end mark included as text."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
