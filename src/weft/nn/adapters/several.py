"""Several LoRA adapters beside one base, of which every row of a pass has its own, or none."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from weft.nn.adapters.shared import Adapters
from weft.nn.linear import Linear, affine
from weft.nn.model import Model


class SeveralLoRA(nn.Module):
    """y = W x + b + B (A x where the gate is open, else 0), with the A and B of all adapters side by side: two products, however many
    adapters there are.

    a [R, in] and b [out, R], R the sum of all their ranks; gates [adapters + 1, R] bool let through what belongs to a row's adapter, the
    first row of it nothing. What the others would add is exactly zero, also where their A x is no finite number, so that a row has the same
    bits whatever its company, where a product has (`affine`). B has to be finite.
    """

    a: Tensor
    b: Tensor
    gates: Tensor

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor] | None], linear: Linear, shared: Adapters) -> None:
        """factors: A [r, in] and factor B [out, r] of each adapter, None for one that leaves this map alone."""
        super().__init__()
        self.shared = shared
        there = [pair for pair in factors if pair is not None]
        self.ranks = ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in factors)
        self.register_buffer("a", torch.cat([a for a, _ in there]), persistent=False)
        self.register_buffer("b", torch.cat([b for _, b in there], 1), persistent=False)
        owner = torch.repeat_interleave(torch.arange(1, len(ranks) + 1), torch.tensor(ranks))
        self.register_buffer("gates", torch.arange(len(ranks) + 1)[:, None] == owner, persistent=False)

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        y = affine(x, linear.weight, linear.bias)
        if self.shared.off or self.shared.chosen is None:
            return y
        z = affine(x, self.a)
        return y + affine(z.where(self.shared.gate(self.ranks, self.gates), 0), self.b)


def naive_several(x: Tensor, linear: Linear, factors: Sequence[tuple[Tensor, Tensor] | None], chosen: Sequence[int]) -> Tensor:
    """The definition, row by row: x [B, T, D], the adapter of each row counted from 1; the twin of `SeveralLoRA`."""
    rows = []
    for row, number in zip(x, chosen, strict=True):
        y = affine(row, linear.weight, linear.bias)
        pair = factors[number - 1] if number else None
        rows.append(y if pair is None else y + row @ pair[0].t() @ pair[1].t())
    return torch.stack(rows)


def put_several(model: Model, shared: Adapters, factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], dtype: torch.dtype) -> None:
    """Put adapters by name, each the factors of some linear maps by theirs, beside the maps of a model."""
    modules = dict.fromkeys(module for adapter in factors.values() for module in adapter)
    for name in modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        pairs = [adapter.get(name) for adapter in factors.values()]
        device = model.device
        cast = [None if pair is None else (pair[0].to(device, dtype), pair[1].to(device, dtype)) for pair in pairs]
        linear.adapter = SeveralLoRA(cast, linear, shared).to(device)
    shared.names = tuple(factors)
