"""What attention costs: each kind beside dense multi-head attention of the same size, in time, memory and decode state, as texts grow.

    python benchmarks/attention.py                     about twenty minutes on two cores
    python benchmarks/attention.py --rounds 1 --quick  whether it runs

A model of two layers that hold nothing but the mixer, width 512, eight heads of 64. Training is a forward and a backward pass in bfloat16
autocast over 4,096 tokens, or one row where texts are longer; decoding is one row's next token in bfloat16 after a text of that length.
Every kind has a process of its own, and all take turns; what a first training pass adds to a process's memory is seen in a fresh one, as
later passes find memory that the allocator keeps. The last line is one JSON object.
"""

import argparse
import contextlib
import ctypes
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from race import Racer, machine, publish, spread, tell

DIM, HEADS, LAYERS, TOKENS = 512, 8, 2, 4096
LENGTHS = (512, 1024, 4096, 16384)
CHUNK, NEW = 256, 16
ROPE: dict[str, Any] = {"rope": {"base": 10000.0}}
MHA: dict[str, Any] = {"type": "attention", "heads": HEADS, **ROPE}
KINDS: dict[str, dict[str, Any]] = {
    "MHA (dense)": MHA,
    "GQA, 2 key-value heads": {**MHA, "kv_heads": 2},
    "MQA": {**MHA, "kv_heads": 1},
    "MLA, latent 128 + 32": {
        "type": "latent_attention", "heads": HEADS, "kv_rank": 128, "nope_head_dim": 64, "rope_head_dim": 32, "v_head_dim": 64, **ROPE,
    },
    "window 256": {**MHA, "window": 256},
    "streaming, window 252 + 4 sinks": {**MHA, "pattern": {"type": "streaming", "window": 252, "sinks": 4}},
    "dilated, 128 keys of every 2nd": {**MHA, "pattern": {"type": "dilated", "window": 128, "dilation": 2}},
    "strided 128": {**MHA, "pattern": {"type": "strided", "stride": 128}},
    "fixed 128, summary 8": {**MHA, "pattern": {"type": "fixed", "stride": 128, "summary": 8}},
    "1.5-entmax": {"type": "entmax_attention", "heads": HEADS, **ROPE},
}  # fmt: skip
DENSE = "MHA (dense)"
# Kinds whose training pass holds all scores at once; a text of 16,384 tokens has 8.6 GB of them in one layer.
WHOLE_SCORES = ("1.5-entmax",)
LINEAR = ("window 256", "streaming, window 252 + 4 sinks", "dilated, 128 keys of every 2nd")


def contestant(mixer: dict[str, Any]) -> Callable[..., Any]:
    """Answers ("train", length) with seconds and bytes, ("decode", length) with seconds a token, ("state", length) with bytes a token."""
    import torch

    from weft.nn import Arena, Runner, build
    from weft.spec import model_spec
    from weft.train.heap import keep_freed_memory

    keep_freed_memory()  # as the trainer does

    layers = [{"repeat": LAYERS, "mixer": mixer}]
    spec = model_spec({"vocab": 256, "dim": DIM, "context": max(LENGTHS) + NEW, "norm": {"type": "rms"}, "layers": layers})
    trained, decoder = build(spec, seed=0), build(spec, dtype=torch.bfloat16, seed=0).eval()
    filled: dict[int, tuple[Any, Any]] = {}

    def train(length: int) -> tuple[float, int]:
        tokens = torch.randint(256, (max(1, TOKENS // length), length), generator=torch.Generator().manual_seed(1))
        before = memory(reset=True)
        seconds = [once(tokens) for _ in range(2)]  # the second finds its memory, as a trainer's steps do
        held = memory() - before
        release()  # the other contestants need it
        return seconds[1], held

    def once(tokens: torch.Tensor) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = trained(tokens).hidden
        hidden.float().square().mean().backward()
        seconds = time.perf_counter() - start
        trained.zero_grad()
        return seconds

    @torch.inference_mode()
    def decode(length: int) -> float:
        if length not in filled:
            arena = Arena(decoder, 1, length + NEW, CHUNK, page=64)
            runner, tokens = Runner(decoder, arena), torch.randint(256, (1, length), generator=torch.Generator().manual_seed(2))
            for start in range(0, length, CHUNK):
                arena.reserve({0: start + CHUNK})
                runner(tokens[:, start : start + CHUNK], torch.tensor([CHUNK]), 1, (start + CHUNK) // 64)
            arena.reserve({0: length + NEW})
            filled[length] = arena, runner
        arena, runner = filled[length]
        token, one = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long)
        runner(token, one, 1)
        start = time.perf_counter()
        for _ in range(NEW - 1):
            runner(token, one, 1)
        seconds = (time.perf_counter() - start) / (NEW - 1)
        arena.rewind(0, length)
        return seconds

    def state(length: int) -> float:
        said, held = decoder.spec.state_bytes(length, 2), Arena(decoder, 1, 8, 8).state_bytes(length)
        assert said == held, f"the spec says {said} bytes, the arena holds {held}"
        return said / length

    answers = {"train": train, "decode": decode, "state": state}
    return lambda what, length: answers[what](length)


def release() -> None:
    """Give freed memory back to the system, where the C library can be told to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory(reset: bool = False) -> int:
    """The most bytes this process has held since the last reset; what it holds now, where it is reset. 0 where Linux is not asked."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmRSS:" if reset else "VmHWM:"
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


Found = dict[str, dict[int, dict[str, list[float]]]]  # kind, length, "train" and "decode": seconds


def measure(racers: dict[str, Racer], lengths: tuple[int, ...], rounds: int) -> Found:
    found: Found = {name: {length: {"train": [], "decode": []} for length in lengths} for name in racers}
    for number in range(rounds):
        for length in lengths:
            for name in random.sample(list(racers), len(racers)):
                own = found[name][length]
                if fits(name, length):
                    seconds, _ = racers[name].ask("train", length)
                    own["train"].append(seconds)
                seconds = racers[name].ask("decode", length)
                own["decode"].append(seconds)
        tell(f"round {number + 1} of {rounds}")
    return found


def fits(name: str, length: int) -> bool:
    """Whether a training pass can be asked for."""
    return not (name in WHOLE_SCORES and length > TOKENS)


def training_bytes(mixer: dict[str, Any], length: int) -> int:
    """What a training pass adds to the memory of a process that has made none of this size."""
    racer = Racer("memory", contestant, mixer)
    racer.ask("train", 64)
    _, held = racer.ask("train", length)
    racer.leave()
    return int(held)


def summary(found: Found, state: dict[str, dict[int, float]], memory: dict[str, dict[int, int]]) -> dict[str, Any]:
    """Per kind and length: times as parts of the dense form's, round by round, memory, and bytes of state a token."""
    rows: dict[str, Any] = {}
    for name, lengths in found.items():
        rows[name] = {}
        for length, own in lengths.items():
            dense = found[DENSE][length]
            row: dict[str, Any] = {"state_bytes_per_token": round(state[name][length], 1)}
            for what in ("train", "decode"):
                if own[what]:
                    row[f"{what}_of_dense"] = spread([mine / theirs for mine, theirs in zip(own[what], dense[what], strict=True)])
                    row[f"{what}_ms"] = round(1e3 * spread(own[what])["median"], 3)
            if length in memory[name]:
                row["train_bytes"] = memory[name][length]
            rows[name][str(length)] = row
    return rows


def growth(rows: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, Any]:
    """How many times the cost of a text of TOKENS tokens its multiple costs: 4 where it is linear, as one row is run of both."""
    first, last = TOKENS, lengths[-1]
    found: dict[str, Any] = {"of": last / first}
    for name in (*LINEAR, DENSE):
        own = rows[name]
        found[name] = {what: round(own[str(last)][what] / max(1e-9, own[str(first)][what]), 2) for what in ("train_ms", "train_bytes")}
    return found


def table(rows: dict[str, Any], lengths: tuple[int, ...]) -> None:
    """Markdown: training and decoding as parts of the dense form's time, and bytes of state a token."""

    def part(row: dict[str, Any], what: str) -> str:
        return f"{row[what]['median']:.2f}" if what in row else "-"

    tell("\n| kind | " + " | ".join(f"{length:,}" for length in lengths) + " |\n|---|" + "---|" * len(lengths))
    for name, own in rows.items():
        cells = []
        for length in lengths:
            row = own[str(length)]
            cells.append(f"{part(row, 'train_of_dense')}, {part(row, 'decode_of_dense')}, {row['state_bytes_per_token']:,.0f}")
        tell(f"| {name} | " + " | ".join(cells) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="short texts only, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    facts = machine()
    racers = {name: Racer(name, contestant, mixer) for name, mixer in KINDS.items()}
    state = {name: {length: racer.ask("state", length) for length in lengths} for name, racer in racers.items()}
    found = measure(racers, lengths, options.rounds)
    for racer in racers.values():
        racer.leave()
    held = {name: {length: training_bytes(mixer, length) for length in lengths if fits(name, length)} for name, mixer in KINDS.items()}
    rows = summary(found, state, held)
    table(rows, lengths)
    result = {"benchmark": "attention", "machine": facts, "rounds": options.rounds, "kinds": rows}
    publish(result if options.quick else {**result, "growth": growth(rows, lengths)}, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
