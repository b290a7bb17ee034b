"""Training tokens per second against transformers: one model, one run, configurations interleaved round by round.

    python benchmarks/train.py [--rounds 8] [--rows 8] [--length 512] [--json results.json]

The model is a Llama of 5.4 million parameters, made by Weft, saved, and loaded by transformers, so that both hold the same weights. A
configuration is a whole training step: forward, loss, backward, clipping, fused AdamW. Before anything is timed, each must give the
reference loss (float32 eager transformers): within 3e-5 in float32, 1e-2 in bfloat16; else nothing is reported.

Peers: transformers eager in float32, and in bfloat16 autocast eager and compiled, the last with torch's fused attention and with its own
"eager" attention, whichever is faster. Weft runs the step of its own trainer. Each round runs every configuration once in shuffled order;
a ratio is the median over rounds of the peer's time over Weft's in the same round.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from weft.data.packing import PackedBatch
from weft.nn import Model, build
from weft.objectives.next_token import NextToken
from weft.spec import ModelSpec, model_spec
from weft.train.optim import Optimizer
from weft.train.parallel import World
from weft.train.settings import OptimSettings
from weft.train.window import loss_function, open_window, run_window
from weft.weights.save import save_model

LEARNING_RATE = 1e-4
Step = Callable[[PackedBatch], float]


def llama(length: int) -> ModelSpec:
    """5.4 million parameters, 1 million of them the tied embedding."""
    layer = {
        "repeat": 6,
        "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {"base": 10000.0}},
        "channel": {"type": "gated", "hidden": 688},
    }
    return model_spec({"vocab": 4096, "dim": 256, "context": length, "norm": {"type": "rms", "eps": 1e-5}, "layers": [layer]})


def make_batch(rows: int, length: int, vocab: int, seed: int) -> PackedBatch:
    """Whole rows of random tokens: the work does not depend on which."""
    tokens = torch.randint(vocab, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).expand(rows, length)
    mask = torch.ones(rows, length, dtype=torch.bool)
    return PackedBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, None, mask, 0)


def weft_step(model: Model, dtype: torch.dtype, compiled: bool) -> Step:
    """The trainer's own step: one micro-batch, its loss function, its optimiser."""
    objective, world = NextToken(), World()
    compute = loss_function(objective, {"policy": model.train()}, dtype, compiled)
    optimizer = Optimizer(model, OptimSettings(lr=LEARNING_RATE))

    def step(batch: PackedBatch) -> float:
        window, _ = open_window(objective, batch, None, torch.device("cpu"), world)
        sums = run_window(window, compute, optimizer.parameters, world)
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
        optimizer.step(1.0)
        return float(sums.sums["next_token"] / sums.counts["next_token"])

    return step


def transformers_step(folder: Path, dtype: torch.dtype, compiled: bool, attention: str) -> Step:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def compute(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss: torch.Tensor = model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        return loss

    run = torch.compile(compute, dynamic=False) if compiled else compute

    def step(batch: PackedBatch) -> float:
        loss = run(batch.tokens, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def configurations(folder: Path, spec: ModelSpec) -> dict[str, tuple[torch.dtype, Callable[[], Step]]]:
    wide, narrow = torch.float32, torch.bfloat16

    def ours() -> Model:
        return build(spec, seed=0)

    return {
        "transformers float32 eager": (wide, lambda: transformers_step(folder, wide, False, "sdpa")),
        "transformers bfloat16 eager": (narrow, lambda: transformers_step(folder, narrow, False, "sdpa")),
        "transformers bfloat16 compiled": (narrow, lambda: transformers_step(folder, narrow, True, "sdpa")),
        "transformers bfloat16 compiled, eager attention": (narrow, lambda: transformers_step(folder, narrow, True, "eager")),
        "weft float32 eager": (wide, lambda: weft_step(ours(), wide, False)),
        "weft bfloat16 eager": (narrow, lambda: weft_step(ours(), narrow, False)),
        "weft bfloat16 compiled": (narrow, lambda: weft_step(ours(), narrow, True)),
    }


def prepare(chosen: dict[str, tuple[torch.dtype, Callable[[], Step]]], batch: PackedBatch) -> dict[str, Step]:
    """Build and warm up every configuration, and refuse those that do not compute the reference loss."""
    steps, reference = {}, None
    for name, (dtype, make) in chosen.items():
        start = time.perf_counter()
        steps[name] = make()
        loss = steps[name](batch)
        reference = loss if reference is None else reference
        tolerance = 3e-5 if dtype == torch.float32 else 1e-2
        print(f"{name}: first step {time.perf_counter() - start:.1f} s, loss {loss:.6f}", file=sys.stderr, flush=True)
        if abs(loss - reference) > tolerance:
            sys.exit(f"{name} gives the loss {loss:.6f}, the reference {reference:.6f}: not the same model, so nothing is timed.")
        steps[name](batch)
    return steps


def measure(steps: dict[str, Step], batches: list[PackedBatch], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for index in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name](batches[index % len(batches)])
            seconds[name].append(time.perf_counter() - start)
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    spec = llama(options.length)
    batches = [make_batch(options.rows, options.length, spec.vocab, seed) for seed in range(4)]
    with tempfile.TemporaryDirectory() as scratch:
        save_model(build(spec, seed=0), Path(scratch) / "model")
        steps = prepare(configurations(Path(scratch) / "model", spec), batches[0])
        seconds = measure(steps, batches, options.rounds)
    best_peer = min((name for name in seconds if name.startswith("transformers")), key=lambda name: statistics.median(seconds[name]))
    tokens = options.rows * options.length
    rows = []
    for name, times in seconds.items():
        against = [peer / own for peer, own in zip(seconds[best_peer], times, strict=True)]
        quartiles = statistics.quantiles(against, n=4) if len(against) > 1 else [against[0]] * 3
        rate = tokens / statistics.median(times)
        rows.append(
            {"name": name, "tokens_per_s": round(rate, 1), "ratio": round(quartiles[1], 3), "quartiles": [round(q, 3) for q in quartiles]}
        )
        print(f"{name:50s} {rate:8.0f} tokens/s   {quartiles[1]:5.2f} times {best_peer} ({quartiles[0]:.2f} to {quartiles[2]:.2f})")
    ratio = next(row["ratio"] for row in rows if row["name"] == "weft bfloat16 compiled")
    result = {
        "benchmark": "train",
        "parameters": spec.num_params(),
        "rows": options.rows,
        "length": options.length,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "best_peer": best_peer,
        "ratio": ratio,
        "configurations": rows,
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
