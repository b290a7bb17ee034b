"""Rules by which tensors of the same shape become one. All compute in the dtype they are given."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

PARALLEL = 1e-6  # sine of an angle below which two tensors lie on a line, and SLERP is the straight way


def shares(weights: Sequence[float]) -> list[float]:
    """Weights scaled to a sum of 1."""
    return [weight / sum(weights) for weight in weights]


def decaying(count: int, decay: float) -> list[float]:
    """Shares of an exponential average over checkpoints in the order they were made: each weighs `decay` times the one after it."""
    return shares([decay ** (count - 1 - index) for index in range(count)])


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w_i t_i: a model soup (Wortsman et al. 2022) where the weights add up to 1."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a at t = 0 to b at t = 1 along the great circle between their directions, each tensor taken as one vector:
    (sin((1 - t) w) a + sin(t w) b) / sin(w) for the angle w between them (Shoemake 1985, section 3.3).

    Straight where they point the same or opposite ways, or one of them is zero: there is then no one circle through both.
    """
    wide = (a.double().flatten(), b.double().flatten())
    lengths = wide[0].norm() * wide[1].norm()
    cosine = float((wide[0] @ wide[1] / lengths).clamp(-1, 1)) if lengths > 0 else 1.0
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    sine = float(angle.sin())
    if sine < PARALLEL:
        return linear((a, b), (1 - t, t))
    return linear((a, b), (float(((1 - t) * angle).sin()) / sine, float((t * angle).sin()) / sine))


def ties(base: Tensor, models: Sequence[Tensor], thresholds: Sequence[float], weights: Sequence[float], scale: float = 1.0) -> Tensor:
    """base + scale * what the models' changes agree on (Yadav et al. 2023, algorithm 1).

    thresholds  of each model: changes of smaller magnitude are trimmed to zero.
    weights     of each model in the vote and in the mean; all equal is the paper's.

    For every number the sign is elected whose changes weigh more, and the changes of that sign are averaged; those that were trimmed, or
    have the other sign, are no part of the mean.
    """
    changes = [model - base for model in models]
    kept = [torch.where(change.abs().float() >= threshold, change, 0) for change, threshold in zip(changes, thresholds, strict=True)]
    elected = linear(kept, weights).sign()
    total, counted = torch.zeros_like(base), torch.zeros_like(base)
    for change, weight in zip(kept, weights, strict=True):
        agrees = (change.sign() == elected) & (change != 0)
        total += torch.where(agrees, change * weight, 0)
        counted += agrees * weight
    return base + scale * total / counted.clamp(min=torch.finfo(base.dtype).tiny)


def magnitude(changes: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The magnitude from which on `density` of all numbers lie: the largest float32 at or above which there are at least so many of them.

    changes  gives all tensors, one after the other, each time it is called: they are read twice and never held together. The bits of a
             magnitude grow with it, so the upper half of them is counted first, then the lower half of those that share the upper one.
    """
    high, low, total = torch.zeros(1 << 15, dtype=torch.int64), torch.zeros(1 << 16, dtype=torch.int64), 0
    for tensor in changes():
        bits = _bits(tensor)
        high += torch.bincount(bits >> 16, minlength=1 << 15)
        total += bits.numel()
    wanted = max(1, round(density * total))
    upper, above = _reached(high, wanted)
    for tensor in changes():
        bits = _bits(tensor)
        low += torch.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=1 << 16)
    lower, _ = _reached(low, wanted - above)
    return float(torch.tensor([upper << 16 | lower], dtype=torch.int32).view(torch.float32))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.float().abs().flatten().contiguous().view(torch.int32)


def _reached(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin, from the last one down, in which the running count reaches `wanted`, and what it was before that bin."""
    running = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(running, torch.tensor(wanted)))
    return len(counts) - 1 - at, int(running[at] - counts.flip(0)[at])
