"""One optimiser step's worth of micro-batches: forward, backward, and one global count a term."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.errors import UserError
from weft.train.objective import Batch, Models, Objective, Term
from weft.train.parallel import World

Terms = Mapping[str, Term]


class Computed(NamedTuple):
    """What a micro-batch gave: the scaled loss that is differentiated, and the sums it was made of."""

    loss: Tensor
    terms: Terms
    metrics: Terms


LossFunction = Callable[[Batch, Mapping[str, Tensor]], Computed]


class Window:
    """The micro-batches of one step of this process, and the counts of all of them on all processes.

    micros  in order; the last may have fewer rows.
    counts  term -> the count its sum is divided by.
    """

    def __init__(self, micros: Sequence[Batch], counts: Mapping[str, float]) -> None:
        self.micros, self.counts = micros, counts


def open_window(
    objective: Objective[Any], batch: Batch, micro_rows: int | None, device: torch.device, world: World, flags: Sequence[bool] = ()
) -> tuple[Window, list[bool]]:
    """Cut a batch (on the CPU) into micro-batches on `device`, and agree with the other processes on the counts.

    flags  raised by any process, they are returned raised to all: they travel with the counts, in the one message before a step.
    A term may run over nothing in one step (its addend is then zero); raises UserError where all of them do.
    """
    own = objective.counts(batch)
    message = world.sum(torch.tensor([*own.values(), *map(float, flags)], dtype=torch.float64)).tolist()
    counts = dict(zip(own, message, strict=False))
    if not any(counts.values()):
        raise UserError("a whole batch has nothing to learn from: every target in it is masked. Give larger batches, or longer rows.")
    size = micro_rows or batch.num_rows
    micros = [batch.rows(start, min(start + size, batch.num_rows)).to(device) for start in range(0, batch.num_rows, size)]
    return Window(micros, counts), [value > 0 for value in message[len(own) :]]


def loss_function(objective: Objective[Any], models: Models, dtype: torch.dtype, compiled: bool = False) -> LossFunction:
    """The forward pass and the loss of one micro-batch, in autocast where `dtype` is narrower than the weights.

    compiled  through torch.compile, which differentiates it too: the model, the head and the loss become one graph.
    """
    device = next(next(iter(models.values())).parameters()).device.type
    narrow = dtype in (torch.bfloat16, torch.float16)

    def compute(batch: Batch, scales: Mapping[str, Tensor]) -> Computed:
        with torch.autocast(device, dtype=dtype, enabled=narrow):
            terms, metrics = objective.loss(models, batch)
        addends = [term.weight * term.sum * scales[name] for name, term in terms.items()]
        return Computed(torch.stack(addends).sum(), _detached(terms), _detached(metrics))

    return torch.compile(compute, dynamic=False) if compiled else compute


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile does not work: on a CPU it needs a C++ compiler and Python's headers. Found out by trying."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever is missing or broken
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"compile is true, but torch.compile does not work here ({reason}); set compile to false.") from None


def _detached(terms: Terms) -> Terms:
    return {name: Term(term.sum.detach(), term.count, term.weight) for name, term in terms.items()}


class Sums:
    """Running sums and counts of terms and metrics, kept on the device; `stats` are those metrics that are vectors."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | float] = {}
        self.weights: dict[str, float] = {}
        self.stats: dict[str, Tensor] = {}

    def add(self, computed: Computed) -> None:
        for name, term in {**computed.terms, **computed.metrics}.items():
            if term.sum.dim():
                self.stats[name] = term.sum if name not in self.stats else self.stats[name] + term.sum
                continue
            first = name not in self.sums
            self.sums[name] = term.sum if first else self.sums[name] + term.sum
            self.counts[name] = term.count if first else self.counts[name] + term.count
        self.weights.update({name: term.weight for name, term in computed.terms.items()})

    def row(self) -> Tensor:
        """Sums, then counts, as float64 [2 * names] on their device (float32 where it has no wider)."""
        first = next(iter(self.sums.values()))
        wide = torch.float32 if first.device.type == "mps" else torch.float64
        values = [torch.as_tensor(value, dtype=wide, device=first.device) for value in (*self.sums.values(), *self.counts.values())]
        return torch.stack(values)


def run_window(window: Window, compute: LossFunction, parameters: Sequence[torch.nn.Parameter], world: World) -> Sums:
    """Leave in `.grad` the gradient of the loss over the whole global batch.

    Every term's sum is scaled by one over its global count before its backward pass: gradients of micro-batches and of processes then
    add up to that of one large batch, however unevenly tokens fall on them.
    """
    sums = Sums()
    first = parameters[0]
    scales = {name: torch.tensor(1 / max(count, 1.0), dtype=first.dtype, device=first.device) for name, count in window.counts.items()}
    for micro in window.micros:
        computed = compute(micro, scales)
        torch.autograd.backward(computed.loss)
        sums.add(computed)
    world.sum_gradients(parameters)
    if sums.stats:
        total = world.sum(torch.cat(list(sums.stats.values())))
        sums.stats = dict(zip(sums.stats, torch.split(total, [value.numel() for value in sums.stats.values()]), strict=True))
    return sums
