"""Muon: steepest descent for matrices (Jordan et al. 2024), with the scale of Moonlight (Liu et al. 2025)."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from weft.train.matrices import Weight

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.'s quintic: the steepest at zero that stays near one
ADAM_RMS = 0.2  # the root mean square of AdamW's usual updates (Liu et al. 2025, section 2.2)


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Move all singular values of each matrix [N, R, C] to about 1 (between 0.7 and 1.2), its singular vectors kept.

    Newton and Schulz's iteration X <- a X + (b A + c A^2) X with A = X X^T, in `dtype`; bfloat16 is enough (Jordan et al. 2024).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(-2, -1) if tall else x


class Muon:
    """Momentum, Nesterov's look ahead, orthogonalised: each matrix moves by the same length in every direction it moves in.

    weights   of kind "matrix". Those fused in one parameter are orthogonalised one by one: queries, keys and values are three maps.
    momentum  of the running mean of gradients.
    An update has a root mean square of 0.2 * lr whatever its shape (the factor is 0.2 * sqrt(max(rows, columns))), as AdamW's usually
    has: one learning rate and one weight decay serve both optimisers.

    torch.optim.Muon does the same to whole parameters, one at a time; here matrices of one shape go through the iteration together.
    """

    def __init__(self, weights: Sequence[Weight], weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        self.weights, self.weight_decay, self.momentum = list(weights), weight_decay, momentum
        self.buffers = [torch.zeros_like(weight.parameter) for weight in self.weights]
        # shape with rows <= columns -> (weight, first row, rows of each) of every run of matrices that have it, or its transpose
        self._groups: dict[tuple[int, int], list[tuple[int, slice, int]]] = {}
        for index, weight in enumerate(self.weights):
            first, columns = 0, weight.parameter.shape[-1]
            for rows, run in groupby(weight.rows):
                end = first + rows * len(list(run))
                shape = (min(rows, columns), max(rows, columns))
                self._groups.setdefault(shape, []).append((index, slice(first, end), rows))
                first = end

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every weight from its `.grad`; a weight without one keeps still but for its decay."""
        if not self.weights:
            return
        parameters: list[Tensor] = [weight.parameter for weight in self.weights]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        torch._foreach_lerp_(self.buffers, gradients, 1 - self.momentum)
        ahead = [_rows(each) for each in torch._foreach_lerp(gradients, self.buffers, self.momentum)]
        torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
        for shape, members in self._groups.items():
            # A run of matrices, such as all experts of a layer, is one tensor [n, R, C] and one operation.
            runs = [_stacked(ahead[index][where], rows).to(torch.bfloat16) for index, where, rows in members]
            turned = [run.shape[1:] != shape for run in runs]
            moved = orthogonalise(torch.cat([run.mT if turn else run for run, turn in zip(runs, turned, strict=True)]))
            scale = -lr * ADAM_RMS * math.sqrt(shape[1])
            updates = torch.split(moved, [len(run) for run in runs])
            for (index, where, rows), turn, update in zip(members, turned, updates, strict=True):
                target = _stacked(_rows(parameters[index])[where], rows)
                target.add_(update.mT if turn else update, alpha=scale)

    def state(self) -> dict[str, Tensor]:
        """ "<weight>.momentum" -> tensor."""
        return {f"{weight.name}.momentum": buffer for weight, buffer in zip(self.weights, self.buffers, strict=True)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for weight, buffer in zip(self.weights, self.buffers, strict=True):
            buffer.copy_(state[f"{weight.name}.momentum"])


def _rows(matrices: Tensor) -> Tensor:
    """A parameter [..., R, C] as a view with all its rows one below the other, [-1, C]."""
    return matrices.flatten(0, -2)


def _stacked(matrices: Tensor, rows: int) -> Tensor:
    """Matrices of so many rows, one below the other, as a view [n, rows, C]."""
    return matrices.view(-1, rows, matrices.shape[-1])
