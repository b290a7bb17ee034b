"""Tokens a second of LoRA training, Weft against PEFT with transformers: the same weights, adapter, batches and AdamW, a step each in turn.

    python benchmarks/tune.py --out benchmarks/results/tune-cpu.json      about twenty minutes on two cores
    python benchmarks/tune.py --rounds 3 --tiny                           whether it runs

The base has SmolLM2-135M's architecture and random weights; the adapter, of rank 16 on every linear map, is written by Weft and read by
both. As in `train.py` every contestant lives in a process of its own, and before anything is timed its loss and the norm of the adapter's
gradient are compared with PEFT's in float32: where they differ, nothing is reported and the exit code is 1. Memory is what a process holds
at most while it steps. The last line of output is one JSON object.
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

LR, CLIP, RANK = 1e-4, 1.0, 16
TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2}  # of the loss, absolute, in nats
NORM_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the gradient's norm, relative
QUANTISED = 0.5  # how far weights in 4 bits may move the loss


@dataclass(frozen=True)
class Shape:
    """A batch, and how many of SmolLM2-135M's layers there are. The first `prompt` share of each row is read and not trained on, as much as
    in 500 conversations of a role-play set under SmolLM2's template."""

    layers: int = 30
    rows: int = 2
    length: int = 512
    prompt: float = 0.37

    @property
    def first(self) -> int:
        """The first token whose successor is trained on."""
        return round(self.prompt * self.length)


@dataclass(frozen=True)
class Contestant:
    """One way to train an adapter.

    dtype      "float32", or "bfloat16": products by autocast. The frozen base is kept in the same numbers, except where `wide`.
    attention  transformers: its `attn_implementation`.
    quantised  Weft: the base in NF4 with double quantisation.
    heap       with the allocator setting of Weft's trainer.
    """

    library: str
    dtype: str
    compiled: bool = False
    attention: str = "sdpa"
    wide: bool = False
    quantised: bool = False
    heap: bool = False

    @property
    def name(self) -> str:
        words = [self.library, self.dtype, "compiled" if self.compiled else "eager"]
        if self.library == "peft":
            words.append(self.attention)
            words += ["float32 base"] * (self.wide and self.dtype != "float32") + ["Weft's allocator setting"] * self.heap
        return ", ".join([*words, *["nf4"] * self.quantised])

    @property
    def counts(self) -> bool:
        """Whether it is what a user of PEFT would run."""
        return self.library == "peft" and not self.heap


def contestants(compiled: bool) -> list[Contestant]:
    """The reference first."""
    peers = [Contestant("peft", "float32"), Contestant("peft", "bfloat16"), Contestant("peft", "bfloat16", wide=True)]
    peers += [Contestant("peft", "bfloat16", attention="eager"), Contestant("peft", "bfloat16", heap=True)]
    own = [Contestant("weft", "float32", heap=True), Contestant("weft", "bfloat16", heap=True)]
    own.append(Contestant("weft", "bfloat16", quantised=True, heap=True))
    if compiled:
        peers.append(Contestant("peft", "bfloat16", compiled=True))
        own.append(Contestant("weft", "bfloat16", compiled=True, heap=True))
    return peers + own


# What runs in a contestant's own process.

Step = Callable[[int], tuple[float, float]]  # number of the batch -> loss, norm of the gradient


def batch_of(shape: Shape, number: int) -> Any:
    """Tokens [rows, length + 1]; the same for everyone."""
    import torch

    return torch.randint(0, 49152, (shape.rows, shape.length + 1), generator=torch.Generator().manual_seed(number))


def peft_step(contestant: Contestant, shape: Shape, folder: str) -> Step:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    narrow = contestant.dtype == "bfloat16"
    dtype = torch.bfloat16 if narrow and not contestant.wide else torch.float32
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype, attn_implementation=contestant.attention)
    model = PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(tokens: Any, targets: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    compute = torch.compile(loss_of, dynamic=False) if contestant.compiled else loss_of

    def step(number: int) -> tuple[float, float]:
        tokens = batch_of(shape, number)
        targets = tokens[:, 1:].clone()
        targets[:, : shape.first] = -100
        loss = compute(tokens[:, :-1].contiguous(), targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def weft_step(contestant: Contestant, shape: Shape, folder: str) -> Step:
    """The parts of Weft's trainer that make up one step, with the settings that `weft train` gives them."""
    import torch

    from weft.data.packing import PackedBatch
    from weft.objectives.next_token import NextToken
    from weft.quant.load import load_quantised
    from weft.spec import Quant
    from weft.train.objective import POLICY
    from weft.train.optim import Optimizer, clip_gradients
    from weft.train.parallel import World
    from weft.train.settings import OptimSettings
    from weft.train.window import loss_function, open_window, run_window
    from weft.weights.adapter_files import put_adapter, read_adapter
    from weft.weights.load import load_weights, open_checkpoint

    torch.use_deterministic_algorithms(contestant.compiled, warn_only=True)
    checkpoint, dtype = open_checkpoint(f"{folder}/base"), getattr(torch, contestant.dtype)
    double = Quant(type="nf4", double=True)
    model = load_quantised(checkpoint, double, dtype=dtype) if contestant.quantised else load_weights(checkpoint, dtype=dtype)
    put_adapter(model, read_adapter(f"{folder}/adapter"), checkpoint.family)
    optimizer = Optimizer(model.train(), OptimSettings(lr=LR, clip=CLIP))
    objective, world = NextToken(), World()
    compute = loss_function(objective, {POLICY: model}, dtype, contestant.compiled)
    index = torch.arange(shape.length).repeat(shape.rows, 1)

    def step(number: int) -> tuple[float, float]:
        tokens = batch_of(shape, number)
        batch = PackedBatch(
            tokens=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            positions=index,
            segments=None,
            loss_mask=index >= shape.first,
            num_bytes=0,
        )
        window, _ = open_window(objective, batch, None, torch.device("cpu"), world)
        sums = run_window(window, compute, optimizer.parameters, world)
        norm = clip_gradients(optimizer)
        optimizer.step(1.0)
        return float(sums.sums["next_token"]) / window.counts["next_token"], float(norm)

    return step


def stepper(contestant: Contestant, shape: Shape, folder: str) -> Callable[[int], tuple[float, float, float, int]]:
    """Answers a batch's number with (loss, norm, seconds, most bytes held since it was ready)."""
    if contestant.heap:
        from weft.train.heap import keep_freed_memory

        keep_freed_memory()
    step = (peft_step if contestant.library == "peft" else weft_step)(contestant, shape, folder)
    forget_peak()

    def answer(number: int) -> tuple[float, float, float, int]:
        started = time.perf_counter()
        loss, norm = step(number)
        return loss, norm, time.perf_counter() - started, peak()

    return answer


def forget_peak() -> None:
    """Let the most that this process has held be what it holds now, and give back what loading left over; Linux alone can be told."""
    import ctypes
    import gc

    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def write_inputs(shape: Shape, folder: str, seed: int) -> None:
    """A base in bfloat16 and an adapter for everyone. The adapter's second factors are not zero, so that all of it has gradients."""
    import torch

    from weft.nn import build
    from weft.spec import model_spec
    from weft.spec.adapters import LoRA
    from weft.weights.adapter_files import adapt, write_adapter
    from weft.weights.load import load_model
    from weft.weights.save import save_model
    from weft.zoo import ENTRIES

    spec = ENTRIES["smollm2-135m"].spec.model_dump()
    spec["layers"] = [{**spec["layers"][0], "repeat": shape.layers}]
    made = build(model_spec({**spec, "init_std": 0.04}), seed=seed, dtype=torch.float32)
    save_model(made, f"{folder}/base", dtype=torch.bfloat16)
    loaded = load_model(f"{folder}/base")
    adapt(loaded.model, LoRA(rank=RANK, alpha=2 * RANK), loaded.checkpoint.family, f"{folder}/base", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    Path(folder, "adapter").mkdir()
    write_adapter(loaded.model, Path(folder, "adapter"))


# What runs in the first process.


class Runner(Racer):
    """A contestant with the seconds of its steps and the most memory it held."""

    def __init__(self, contestant: Contestant, shape: Shape, folder: str) -> None:
        super().__init__(contestant.name, stepper, contestant, shape, folder)
        self.contestant, self.seconds, self.peak = contestant, list[float](), 0

    def step(self, number: int) -> tuple[float, float]:
        loss, norm, seconds, self.peak = self.ask(number)
        self.seconds.append(seconds)
        return loss, norm


def enter(contestant: Contestant, shape: Shape, folder: str) -> tuple[Runner, list[tuple[float, float]]]:
    """Start a process; take three steps, of which the first compiles, and return what they measured."""
    started = time.perf_counter()
    racer = Runner(contestant, shape, folder)
    measured = [racer.step(number) for number in (0, 0, 1)]
    racer.seconds.clear()
    tell(f"  ready in {time.perf_counter() - started:5.0f} s, loss {measured[0][0]:.5f}, norm {measured[0][1]:.4f}: {contestant.name}")
    return racer, measured


def disagreement(contestant: Contestant, measured: list[tuple[float, float]], reference: list[tuple[float, float]]) -> str | None:
    """What is wrong with a contestant's first step: its loss and its gradient must be the reference's. Other weights are another task."""
    dtype = contestant.dtype
    (loss, norm), (want, want_norm) = measured[0], reference[0]
    if abs(loss - want) > (QUANTISED if contestant.quantised else TOLERANCE[dtype]):
        return f"{contestant.name}: the loss is {loss:.6f} and should be {want:.6f}"
    if not contestant.quantised and abs(norm / want_norm - 1) > NORM_TOLERANCE[dtype]:
        return f"{contestant.name}: the gradient's norm is {norm:.5f} and should be {want_norm:.5f}"
    if not measured[1][0] < loss - 0.005:
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
        facts = {"tokens_per_s": round(tokens / seconds["median"]), "peak_bytes": racer.peak}
        rows.append({"name": racer.contestant.name, **facts, "seconds": seconds, "ratio": spread(ratios)})
    tell(f"\n{'tokens/s':>9} {'peak GB':>8} {'s a step (quartiles)':>24} {'ratio (quartiles)':>22}")
    for row in rows:
        seconds, ratio = ("{median:.3f} ({low:.3f} to {high:.3f})".format(**row[key]) for key in ("seconds", "ratio"))
        tell(f"{row['tokens_per_s']:9,} {row['peak_bytes'] / 1e9:8.2f} {seconds:>24} {ratio:>24}  {row['name']}")
    own = [row for row in rows if row["name"].startswith("weft") and "nf4" not in row["name"]]
    winner = max(own, key=lambda row: row["tokens_per_s"])
    lora, qlora = (next(row for row in rows if row["name"] == f"weft, bfloat16, eager{form}") for form in ("", ", nf4"))
    ratio, memory = winner["ratio"]["median"], qlora["peak_bytes"] / max(1, lora["peak_bytes"])
    tell(f"\nratio to PEFT's best ({best.contestant.name}): {ratio:.2f} ({winner['name']})")
    tell(f"QLoRA's peak memory is {memory:.2f} of LoRA's, {qlora['tokens_per_s'] / lora['tokens_per_s']:.2f} times as fast")
    return {"best_of_peft": best.contestant.name, "best_of_weft": winner["name"], "ratio": ratio, "qlora_memory": memory, "rows": rows}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that are timed")
    parser.add_argument("--eager", action="store_true", help="leave out what has to be compiled")
    parser.add_argument("--tiny", action="store_true", help="two layers and a batch of no interest, to see that everything runs")
    parser.add_argument("--only", help="contestants whose name contains one of these words, with commas between; the reference always")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    shape = Shape(layers=2, rows=2, length=40) if options.tiny else Shape()
    facts = machine("transformers", "peft")
    racers: list[Runner] = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = [str(Path(temporary, str(seed))) for seed in range(2)]
        for seed, folder in enumerate(folders):
            Path(folder).mkdir()
            write_inputs(shape, folder, seed)
        first, *others = contestants(not options.eager)
        words = options.only.split(",") if options.only else [""]
        reference: list[tuple[float, float]] = []
        for contestant in [first, *(each for each in others if any(word in each.name for word in words))]:
            racer, measured = enter(contestant, shape, folders[0])
            racers.append(racer)
            reference = reference or measured
            wrong = disagreement(contestant, measured, reference)
            if wrong:
                tell(f"{wrong}. Nothing is reported.")
                return 1
        control, measured = enter(others[0], shape, folders[1])
        control.leave()
        if disagreement(others[0], measured, reference) is None:
            tell("A model with other weights passes for the same one: the comparison is worth nothing. Nothing is reported.")
            return 1
        for number in range(2, 2 + options.rounds):
            for racer in random.sample(racers, len(racers)):
                racer.step(number)
        for racer in racers:
            racer.leave()
    result = {"benchmark": "tune", "shape": asdict(shape), "rounds": options.rounds, "machine": facts, **report(racers, shape)}
    publish(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
