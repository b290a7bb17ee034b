"""Tokens a second of training, Weft against transformers: the same weights, the same batches, the same AdamW, one step each in turn.

    python benchmarks/train.py                      about ten minutes on two cores, most of it compiling
    python benchmarks/train.py --rounds 3 --tiny    whether it runs

Every contestant lives in a process of its own, so that each has the allocator, the threads and the caches that its users get; they
all wait while one steps. Before anything is timed, the loss and the gradient's norm of each are compared with transformers in
float32: where they differ, nothing is reported and the exit code is 1. The last line of output is one JSON object.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from race import Racer, machine, publish, spread, tell

LR, CLIP = 1e-3, 1.0
TOLERANCE = {"float32": 3e-5, "bfloat16": 1e-2}  # of the loss, absolute, in nats
NORM_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of the gradient's norm, relative


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch; the default has 5.4 million parameters."""

    vocab: int = 4096
    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 688
    rows: int = 8
    length: int = 512


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    dtype      of the products, by autocast; weights and optimiser are float32.
    attention  transformers: its `attn_implementation`. Weft: "whole", or "packed" for documents of 100 tokens that do not see each other.
    rounded    weights and optimiser in bfloat16 too: another training than the rest, shown and not counted.
    heap       with the allocator setting of Weft's trainer.
    """

    library: str
    dtype: str
    compiled: bool
    attention: str
    rounded: bool = False
    heap: bool = False

    @property
    def name(self) -> str:
        words = [self.library, self.dtype, "compiled" if self.compiled else "eager", self.attention]
        if self.rounded:
            words.append("bfloat16 weights")
        if self.heap and self.library != "weft":
            words.append("Weft's allocator setting")
        return ", ".join(words)

    @property
    def counts(self) -> bool:
        """Whether it is what a user of transformers would run to train the same model in the same way."""
        return self.library == "transformers" and not self.rounded and not self.heap


def contestants(compiled: bool) -> list[Contestant]:
    """The reference first."""
    peers = [Contestant("transformers", "float32", False, "sdpa"), Contestant("transformers", "bfloat16", False, "sdpa")]
    own = [Contestant("weft", "float32", False, "whole", heap=True), Contestant("weft", "bfloat16", False, "whole", heap=True)]
    if compiled:
        for attention in ("sdpa", "eager"):
            peers.append(Contestant("transformers", "bfloat16", True, attention))
        peers.append(Contestant("transformers", "bfloat16", True, "eager", heap=True))
        peers.append(Contestant("transformers", "bfloat16", True, "eager", rounded=True, heap=True))
        own += [Contestant("weft", "bfloat16", True, attention, heap=True) for attention in ("whole", "packed")]
    return peers + own


# What runs in a contestant's own process.

Step = Callable[[int], tuple[float, float]]  # number of the batch -> loss, norm of the gradient


def batch_of(shape: Shape, number: int) -> Any:
    """Tokens [rows, length + 1]; the same for everyone."""
    import torch

    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, shape.vocab, (shape.rows, shape.length + 1), generator=generator)


def transformers_step(contestant: Contestant, shape: Shape, folder: str) -> Step:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if contestant.rounded else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=contestant.attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    narrow = contestant.dtype == "bfloat16" and not contestant.rounded

    def loss_of(tokens: Any, targets: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    compute = torch.compile(loss_of, dynamic=False) if contestant.compiled else loss_of

    def step(number: int) -> tuple[float, float]:
        tokens = batch_of(shape, number)
        loss = compute(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def weft_step(contestant: Contestant, shape: Shape, folder: str) -> Step:
    """The parts of Weft's trainer that make up one step, with the settings that `weft train` gives them."""
    import torch

    from weft.data.packing import PackedBatch
    from weft.objectives.next_token import NextToken
    from weft.train.objective import POLICY
    from weft.train.optim import Optimizer, clip_gradients
    from weft.train.parallel import World
    from weft.train.settings import OptimSettings
    from weft.train.window import loss_function, open_window, run_window
    from weft.weights.load import load_model

    torch.use_deterministic_algorithms(contestant.compiled, warn_only=True)
    model = load_model(folder, dtype=torch.float32).model.train()
    optimizer = Optimizer(model, OptimSettings(lr=LR, clip=CLIP))
    objective, world = NextToken(), World()
    compute = loss_function(objective, {POLICY: model}, getattr(torch, contestant.dtype), contestant.compiled)
    index = torch.arange(shape.length).repeat(shape.rows, 1)
    packed = contestant.attention == "packed"

    def step(number: int) -> tuple[float, float]:
        tokens = batch_of(shape, number)
        batch = PackedBatch(
            tokens=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            positions=index % 100 if packed else index,
            segments=index // 100 if packed else None,
            loss_mask=torch.ones_like(index, dtype=torch.bool),
            num_bytes=0,
        )
        window, _ = open_window(objective, batch, None, torch.device("cpu"), world)
        sums = run_window(window, compute, optimizer.parameters, world)
        norm = clip_gradients(optimizer)
        optimizer.step(1.0)
        return float(sums.sums["next_token"]) / window.counts["next_token"], float(norm)

    return step


def stepper(contestant: Contestant, shape: Shape, folder: str) -> Callable[[int], tuple[float, float, float]]:
    """Answers a batch's number with (loss, norm, seconds)."""
    if contestant.heap:
        from weft.train.heap import keep_freed_memory

        keep_freed_memory()
    build = transformers_step if contestant.library == "transformers" else weft_step
    step = build(contestant, shape, folder)

    def answer(number: int) -> tuple[float, float, float]:
        started = time.perf_counter()
        loss, norm = step(number)
        return loss, norm, time.perf_counter() - started

    return answer


def write_model(shape: Shape, folder: str, seed: int) -> None:
    """Initial weights for everyone. They are larger than usual, so that a wrong model shows in its loss."""
    from weft.nn import build
    from weft.spec import model_spec
    from weft.weights.save import save_model

    mixer = {"type": "attention", "heads": shape.heads, "kv_heads": shape.kv_heads, "rope": {"base": 10000.0}}
    layers = [{"repeat": shape.layers, "mixer": mixer, "channel": {"type": "gated", "hidden": shape.hidden}}]
    sizes = {"vocab": shape.vocab, "dim": shape.dim, "context": shape.length, "init_std": 0.1}
    spec = model_spec({**sizes, "tie_embeddings": True, "norm": {"type": "rms", "eps": 1e-5}, "layers": layers})
    save_model(build(spec, seed=seed), folder)


# What runs in the first process.


class Runner(Racer):
    """A contestant with the seconds of its steps."""

    def __init__(self, contestant: Contestant, shape: Shape, folder: str) -> None:
        super().__init__(contestant.name, stepper, contestant, shape, folder)
        self.contestant, self.seconds = contestant, list[float]()


def enter(contestant: Contestant, shape: Shape, folder: str) -> tuple[Runner, list[tuple[float, float]]]:
    """Start a process; take three steps, of which the first compiles, and return what they measured."""
    started = time.perf_counter()
    racer = Runner(contestant, shape, folder)
    measured = [racer.ask(number)[:2] for number in (0, 0, 1)]
    tell(f"  ready in {time.perf_counter() - started:5.0f} s, loss {measured[0][0]:.5f}, norm {measured[0][1]:.4f}: {contestant.name}")
    return racer, measured


def disagreement(contestant: Contestant, measured: list[tuple[float, float]], reference: list[tuple[float, float]]) -> str | None:
    """What is wrong with a contestant's first step: its loss and its gradient must be the reference's. Packed rows are another task."""
    dtype = contestant.dtype
    (loss, norm), (want, want_norm) = measured[0], reference[0]
    if contestant.attention != "packed":
        if abs(loss - want) > TOLERANCE[dtype]:
            return f"{contestant.name}: the loss is {loss:.6f} and should be {want:.6f}"
        if abs(norm / want_norm - 1) > NORM_TOLERANCE[dtype]:
            return f"{contestant.name}: the gradient's norm is {norm:.5f} and should be {want_norm:.5f}"
    if not measured[1][0] < loss - 0.05:
        return f"{contestant.name}: a step on one batch moves its loss from {loss:.4f} to {measured[1][0]:.4f} only"
    return None


def report(racers: list[Runner], shape: Shape) -> dict[str, Any]:
    """Medians and quartiles; ratios are taken round by round, then summarised."""
    tokens = shape.rows * shape.length
    best = min((r for r in racers if r.contestant.counts), key=lambda r: statistics.median(r.seconds))
    rows = []
    for racer in racers:
        ratios = [theirs / own for theirs, own in zip(best.seconds, racer.seconds, strict=True)]
        seconds = spread(racer.seconds)
        speed = round(tokens / seconds["median"])
        rows.append({"name": racer.contestant.name, "tokens_per_s": speed, "seconds": seconds, "ratio": spread(ratios)})
    tell(f"\n{'tokens/s':>9} {'s a step (quartiles)':>24} {'ratio (quartiles)':>22}")
    for row in rows:
        seconds, ratio = ("{median:.3f} ({low:.3f} to {high:.3f})".format(**row[key]) for key in ("seconds", "ratio"))
        tell(f"{row['tokens_per_s']:9,} {seconds:>24} {ratio:>24}  {row['name']}")
    own = [row for row in rows if row["name"].startswith("weft") and "packed" not in row["name"]]
    winner = max(own, key=lambda row: row["tokens_per_s"])
    ratio = winner["ratio"]["median"]
    tell(f"\nratio to transformers' best ({best.contestant.name}): {ratio:.2f} ({winner['name']})")
    return {"best_of_transformers": best.contestant.name, "best_of_weft": winner["name"], "ratio": ratio, "rows": rows}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each that are timed")
    parser.add_argument("--eager", action="store_true", help="leave out what has to be compiled")
    parser.add_argument("--tiny", action="store_true", help="a model and a batch of no interest, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    shape = Shape(vocab=128, dim=32, layers=1, heads=2, kv_heads=1, hidden=64, rows=2, length=160) if options.tiny else Shape()
    facts = machine("transformers")
    racers: list[Runner] = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = [str(Path(temporary, str(seed))) for seed in range(2)]
        for seed, folder in enumerate(folders):
            write_model(shape, folder, seed)
        entrants = contestants(not options.eager)
        reference: list[tuple[float, float]] = []
        for contestant in entrants:
            racer, measured = enter(contestant, shape, folders[0])
            racers.append(racer)
            reference = reference or measured
            wrong = disagreement(contestant, measured, reference)
            if wrong:
                tell(f"{wrong}. Nothing is reported.")
                return 1
        control, measured = enter(entrants[1], shape, folders[1])
        control.leave()
        if disagreement(entrants[1], measured, reference) is None:
            tell("A model with other weights passes for the same one: the comparison is worth nothing. Nothing is reported.")
            return 1
        for number in range(2, 2 + options.rounds):
            for racer in random.sample(racers, len(racers)):
                racer.seconds.append(racer.ask(number)[2])
        for racer in racers:
            racer.leave()
    result = {"benchmark": "train", "shape": asdict(shape), "rounds": options.rounds, "machine": facts, **report(racers, shape)}
    publish(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
