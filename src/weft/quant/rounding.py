"""Rounds the weights of a matrix to the nearest of a few levels, group by group."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from weft.nn.packed import AT_ONCE, NF4
from weft.spec.quant import Quant

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range, tried in turn: cutting off the largest weight may round the others better


class Codes(NamedTuple):
    """What `fill` of a packed weight takes: uint8 [rows, columns], scales [rows, groups] in float16 (float32 where they are rounded in
    their turn), and the same or None."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None


class Levels(NamedTuple):
    """The levels of groups [..., n]: float32 [..., 1] scales, already rounded to float16 but for those that are rounded in their turn, and
    minima where there are any."""

    quant: Quant
    scale: Tensor
    minimum: Tensor | None

    def codes(self, weights: Tensor) -> Tensor:
        """The nearest level's number, uint8 like the weights [..., n]."""
        unit = self.scale.clamp(min=1e-30)
        if self.quant.type == "nf4":
            edges = torch.tensor([(a + b) / 2 for a, b in pairwise(NF4)], device=weights.device)
            return torch.bucketize((weights / unit).contiguous(), edges).to(torch.uint8)
        if self.minimum is not None:
            return ((weights - self.minimum) / unit).round().clamp(0, 15).to(torch.uint8)
        middle, most = (128, 127) if self.quant.type == "int8" else (8, 7)
        return ((weights / unit).round().clamp(-most - 1, most) + middle).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """What the codes stand for, float32."""
        if self.quant.type == "nf4":
            return torch.tensor(NF4, device=codes.device)[codes.int()] * self.scale
        if self.minimum is not None:
            return codes * self.scale + self.minimum
        return (codes.float() - (128 if self.quant.type == "int8" else 8)) * self.scale


def fit(groups: Tensor, quant: Quant) -> Levels:
    """Levels for groups [..., n] float32 that leave the smallest squared error of those tried."""
    best, error = None, None
    shrinks = SHRINK if quant.type == "int4" else SHRINK[:1]
    for shrink in shrinks:
        levels = _levels(groups, quant, shrink)
        wrong = (levels.values(levels.codes(groups)) - groups).square().sum(-1, keepdim=True)
        if best is None or error is None:
            best, error = levels, wrong
            continue
        better = wrong < error
        minimum = None if best.minimum is None or levels.minimum is None else torch.where(better, levels.minimum, best.minimum)
        best, error = Levels(quant, torch.where(better, levels.scale, best.scale), minimum), torch.minimum(wrong, error)
    assert best is not None
    return best


def _levels(groups: Tensor, quant: Quant, shrink: float) -> Levels:
    if quant.minimum:
        low, high = groups.amin(-1, keepdim=True) * shrink, groups.amax(-1, keepdim=True) * shrink
        return Levels(quant, _half((high - low) / 15), _half(low))
    most = groups.abs().amax(-1, keepdim=True) * shrink
    return Levels(quant, most if quant.double else _half(most / {"int8": 127, "int4": 7, "nf4": 1}[quant.type]), None)


def _half(values: Tensor) -> Tensor:
    return values.half().float()


def round_to_nearest(weight: Tensor, quant: Quant) -> Codes:
    """Codes of a matrix [rows, columns], each weight by itself."""
    stretches = [_round(rows, quant) for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))]
    codes, scale, minimum = zip(*stretches, strict=True)
    return Codes(torch.cat(codes), torch.cat(scale), None if minimum[0] is None else torch.cat(minimum))


def _round(rows: Tensor, quant: Quant) -> Codes:
    groups = rows.float().unflatten(1, (-1, quant.group))
    levels = fit(groups, quant)
    return as_codes(levels.codes(groups), levels)


def as_codes(codes: Tensor, levels: Levels) -> Codes:
    """Codes [rows, groups, n] and their levels as they are stored."""
    minimum = None if levels.minimum is None else levels.minimum[..., 0].half()
    scale = levels.scale[..., 0]
    return Codes(codes.flatten(1), scale if levels.quant.double else scale.half(), minimum)
