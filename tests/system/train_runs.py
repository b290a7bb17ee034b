"""Runs of `weft train` in processes of their own that can be killed, without paying for the imports each time."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tokenizers
import yaml

# A process that has imported everything, and forks for each command line it reads: once, or as the ranks of a world of several.
HOST = """
import json, os, signal, socket, sys
import torch._dynamo, weft.cli.main, weft.cli.train, weft.machine, weft.train.assemble, weft.train.recipe

weft.machine.SECONDS = 0.0  # no run here waits for an exact measure of the machine

def child(folder, arguments, rank, size, port):
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["weft", *arguments]
    code = 0
    try:
        weft.cli.main.main()
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    folder, arguments, size = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = set()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            child(folder, arguments, rank, size, port)
        running.add(pid)
    print(min(running), flush=True)
    worst = 0
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if os.waitstatus_to_exitcode(status) and not worst:
            worst = os.waitstatus_to_exitcode(status)
            for other in running:  # as torchrun does
                os.kill(other, signal.SIGKILL)
    print(worst, flush=True)
"""

MODEL = {
    "dim": 16,
    "context": 24,
    "norm": {"type": "rms"},
    "dropout": {"embed": 0.1, "attention": 0.1, "residual": 0.1},
    "layers": [{"mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 24}}],
}
RECIPE: dict[str, Any] = {
    "model": MODEL,
    "data": {"sources": ["text.txt"], "valid": 0.1},
    "tokenizer": "tok",
    "out": "run",
    "steps": 40,
    "batch": {"rows": 6, "micro": 4},
    "optim": {"name": "muon", "warmup": 10},
    "eval": {"every": 7, "batches": 1},
    "save": {"every": 3, "minutes": None},
    "log": {"every": 1, "plot": False},
    "dtype": "bfloat16",
}


def make_inputs(folder: Path) -> None:
    """text.txt and a byte-level tokenizer."""
    words = ["the", "loom", "weft", "warp", "thread", "shuttle", "crosses", "under", "over", "and", "back"]
    draw = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(300)))
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False))
    (folder / "tok").mkdir()
    made.save(str(folder / "tok" / "tokenizer.json"))
    (folder / "tok" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))


class Host:
    """Runs `weft` with arguments, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *arguments: str, processes: int = 1) -> int:
        """Begin; returns the process's id, or the first rank's."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(self.folder), list(arguments), processes]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The exit code of what was started, of several the first that is not 0; -9 where it was killed."""
        return int(self._line())

    def run(self, *arguments: str, processes: int = 1) -> int:
        self.start(*arguments, processes=processes)
        return self.wait()

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def rows(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics so far."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(out: Path) -> list[tuple[int, float]]:
    """The loss column."""
    return [(row["step"], row["loss"]) for row in rows(out) if "loss" in row]


def wait_for_step(out: Path, step: int, timeout_s: float = 120.0) -> None:
    """Return when a run's metrics hold `step`."""
    end = time.monotonic() + timeout_s
    while not any(row["step"] >= step for row in rows(out) if "loss" in row):
        assert time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.003)
