"""A training step of each library, compared before it is timed: the frame that `train.py` and `tune.py` share.

Every contestant lives in a process of its own, and all wait while one steps. The first of them is the reference: before anything is
timed, the loss and the gradient's norm of each are compared with its own, and a contestant with other weights must be found out.
"""

import argparse
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from race import Racer, spread, tell

CLIP = 1.0
TIMED = 2  # number of the first batch whose step is timed

Step = Callable[[int], tuple[float, float]]  # number of the batch -> loss, norm of the gradient


class Contestant(Protocol):
    """One way to take a step."""

    @property
    def name(self) -> str: ...
    @property
    def heap(self) -> bool:
        """With the allocator setting of Weft's trainer."""

    @property
    def counts(self) -> bool:
        """Whether it is what a user of the other library would run."""

    @property
    def races(self) -> bool:
        """Whether it is timed, or leaves once it has been compared: processes of large models do not all find room."""

    @property
    def tolerance(self) -> tuple[float, float]:
        """How far it may be from the reference: its loss (absolute, in nats) and its gradient's norm (relative)."""


# What runs in a contestant's own process.


def tokens_of(vocab: int, rows: int, length: int, number: int) -> Any:
    """Tokens [rows, length + 1] of a batch; the same for everyone."""
    import torch

    return torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(number))


def transformers_step(model: Any, batch_of: Callable[[int], tuple[Any, Any]], lr: float, narrow: bool, compiled: bool) -> Step:
    """A step of a model of transformers, products in bfloat16 where `narrow`; `batch_of` gives tokens and targets [rows, length]."""
    import torch

    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(tokens: Any, targets: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    compute = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step(number: int) -> tuple[float, float]:
        loss = compute(*batch_of(number))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def weft_step(model: Any, batch_of: Callable[[int], Any], lr: float, dtype: str, compiled: bool) -> Step:
    """The parts of Weft's trainer that make up one step, with the settings that `weft train` gives them; `batch_of` gives PackedBatch."""
    import torch

    from weft.objectives.next_token import NextToken
    from weft.train.objective import POLICY
    from weft.train.optim import Optimizer, clip_gradients
    from weft.train.parallel import World
    from weft.train.settings import OptimSettings
    from weft.train.window import loss_function, open_window, run_window

    torch.use_deterministic_algorithms(compiled, warn_only=True)
    optimizer = Optimizer(model.train(), OptimSettings(lr=lr, clip=CLIP))
    objective, world = NextToken(), World()
    compute = loss_function(objective, {POLICY: model}, getattr(torch, dtype), compiled)

    def step(number: int) -> tuple[float, float]:
        window, _ = open_window(objective, batch_of(number), None, torch.device("cpu"), world)
        sums = run_window(window, compute, optimizer.parameters, world)
        norm = clip_gradients(optimizer)
        optimizer.step(1.0)
        return float(sums.sums["next_token"]) / window.counts["next_token"], float(norm)

    return step


def stepper(
    step_of: Callable[..., Step], contestant: Contestant, shape: Any, folder: str
) -> Callable[[int], tuple[float, float, float, int]]:
    """Answers a batch's number with (loss, norm, seconds, most bytes held so far)."""
    if contestant.heap:
        from weft.train.heap import keep_freed_memory

        keep_freed_memory()
    step = step_of(contestant, shape, folder)

    def answer(number: int) -> tuple[float, float, float, int]:
        started = time.perf_counter()
        loss, norm = step(number)
        seconds = time.perf_counter() - started
        if number < TIMED:
            give_back()
        return loss, norm, seconds, peak()

    return answer


def give_back() -> None:
    """Let the system have what loading or compiling left over."""
    import ctypes
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Let the most that this process has held be what it holds now; Linux alone can be told."""
    give_back()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


# What runs in the first process.


class Runner(Racer):
    """A contestant with the seconds of its steps and the most memory it held."""

    def __init__(self, step_of: Callable[..., Step], contestant: Contestant, shape: Any, folder: str) -> None:
        super().__init__(contestant.name, stepper, step_of, contestant, shape, folder)
        self.contestant, self.seconds, self.peak = contestant, list[float](), 0

    def step(self, number: int) -> tuple[float, float]:
        loss, norm, seconds, self.peak = self.ask(number)
        self.seconds.append(seconds)
        return loss, norm


def enter(step_of: Callable[..., Step], contestant: Contestant, shape: Any, folder: str) -> tuple[Runner, list[tuple[float, float]]]:
    """Start a process; take three steps, of which the first compiles, and return what they measured."""
    started = time.perf_counter()
    racer = Runner(step_of, contestant, shape, folder)
    measured = [racer.step(number) for number in (0, 0, 1)]
    racer.seconds.clear()
    tell(f"  ready in {time.perf_counter() - started:5.0f} s, loss {measured[0][0]:.5f}, norm {measured[0][1]:.4f}: {contestant.name}")
    return racer, measured


def disagreement(
    contestant: Contestant, measured: list[tuple[float, float]], reference: list[tuple[float, float]], fall: float
) -> str | None:
    """What is wrong with a contestant's first step: its loss and its gradient must be the reference's, and the loss fall by `fall`."""
    (loss, norm), (want, want_norm) = measured[0], reference[0]
    of_loss, of_norm = contestant.tolerance
    if abs(loss - want) > of_loss:
        return f"{contestant.name}: the loss is {loss:.6f} and should be {want:.6f}"
    if abs(norm / want_norm - 1) > of_norm:
        return f"{contestant.name}: the gradient's norm is {norm:.5f} and should be {want_norm:.5f}"
    if not measured[1][0] < loss - fall:
        return f"{contestant.name}: a step on one batch moves its loss from {loss:.4f} to {measured[1][0]:.4f} only"
    return None


def take_turns(
    entrants: Sequence[Contestant],
    control: Contestant,
    write: Callable[[Any, str, int], None],
    step_of: Callable[..., Step],
    shape: Any,
    rounds: int,
    fall: float,
) -> list[Runner] | None:
    """Every entrant with its seconds, or None where one does not do what the first does; why is told.

    write    of (shape, folder, seed): writes what everyone starts from.
    step_of  of (contestant, shape, folder): makes its step; it runs in the contestant's process.
    control  must not pass for the first when it starts from another seed.
    fall     by how much a step on a batch must lower its loss, in nats.
    """
    racers: list[Runner] = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = [str(Path(temporary, str(seed))) for seed in range(2)]
        for seed, folder in enumerate(folders):
            Path(folder).mkdir()
            write(shape, folder, seed)
        reference: list[tuple[float, float]] = []
        for contestant in entrants:
            racer, measured = enter(step_of, contestant, shape, folders[0])
            reference = reference or measured
            wrong = disagreement(contestant, measured, reference, fall)
            if wrong:
                tell(f"{wrong}. Nothing is reported.")
                return None
            if contestant.races:
                racers.append(racer)
            else:
                racer.leave()
        racer, measured = enter(step_of, control, shape, folders[1])
        racer.leave()
        if disagreement(control, measured, reference, fall) is None:
            tell("A model with other weights passes for the same one: the comparison is worth nothing. Nothing is reported.")
            return None
        for number in range(TIMED, TIMED + rounds):
            for racer in random.sample(racers, len(racers)):
                racer.step(number)
        for racer in racers:
            racer.leave()
    return racers


def report(racers: list[Runner], tokens: int, peer: str, aside: str, memory: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Who is fastest of either library and a row for each, of steps of `tokens` tokens; ratios are taken round by round, then summarised.

    Weft's contestants whose name contains `aside` do another task and are not its best. `memory` reports peaks too.
    """
    best = min((r for r in racers if r.contestant.counts), key=lambda r: statistics.median(r.seconds))
    rows: list[dict[str, Any]] = []
    for racer in racers:
        ratios = [theirs / own for theirs, own in zip(best.seconds, racer.seconds, strict=True)]
        seconds = spread(racer.seconds)
        facts = {"tokens_per_s": round(tokens / seconds["median"])} | ({"peak_bytes": racer.peak} if memory else {})
        rows.append({"name": racer.contestant.name, **facts, "seconds": seconds, "ratio": spread(ratios)})
    header = f"{'peak GB':>8} " if memory else ""
    tell(f"\n{'tokens/s':>9} {header}{'s a step (quartiles)':>24} {'ratio (quartiles)':>22}")
    for row in rows:
        held = f"{row['peak_bytes'] / 1e9:8.2f} " if memory else ""
        of_seconds, of_ratio = ("{median:.3f} ({low:.3f} to {high:.3f})".format(**row[key]) for key in ("seconds", "ratio"))
        tell(f"{row['tokens_per_s']:9,} {held}{of_seconds:>24} {of_ratio:>24}  {row['name']}")
    own = [row for row in rows if row["name"].startswith("weft") and aside not in row["name"]]
    winner = max(own, key=lambda row: row["tokens_per_s"])
    ratio = winner["ratio"]["median"]
    tell(f"\nratio to {peer}'s best ({best.contestant.name}): {ratio:.2f} ({winner['name']})")
    return {f"best_of_{peer.lower()}": best.contestant.name, "best_of_weft": winner["name"], "ratio": ratio}, rows


def parser(description: str | None, rounds: int, tiny: str) -> argparse.ArgumentParser:
    """The options of both, with what `--tiny` makes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="steps of each that are timed")
    made.add_argument("--eager", action="store_true", help="leave out what has to be compiled")
    made.add_argument("--tiny", action="store_true", help=f"{tiny}, to see that everything runs")
    made.add_argument("--out", type=Path, help="write the JSON here too")
    return made
