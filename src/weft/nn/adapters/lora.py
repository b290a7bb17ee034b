"""LoRA and DoRA: a change of low rank beside a frozen linear map."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.adapters.product import adapted_product
from weft.nn.adapters.shared import Adapters, Place
from weft.nn.linear import Linear, affine, row_squares
from weft.nn.precision import working_dtype
from weft.spec.adapters import LoRA as LoRASettings

Factors = tuple[Tensor, Tensor, Tensor | None]


class Change(nn.Module):
    """The change B A of one map [rows, in]: `a` [rank, in] uniform within 1 / sqrt(in), `b` [rows, rank] zero; with DoRA `magnitude`
    [rows], the length of every row."""

    def __init__(self, rows: int, columns: int, rank: int, magnitude: Tensor | None, like: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(like.new_empty(rank, columns))
        self.b = nn.Parameter(like.new_zeros(rows, rank))
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.to(like.dtype))

    def draw(self, generator: torch.Generator) -> None:
        bound = self.a.shape[1] ** -0.5
        with torch.no_grad():
            self.a.copy_((2 * torch.rand(self.a.shape, generator=generator) - 1) * bound)


class LoRAAdapter(nn.Module):
    """y = W x + b + factor B A drop(x) for the maps of a `Linear` that have a change (Hu et al. 2021, equation 3).

    The changes of fused maps are two products together: A's one below the other, B's along a diagonal. In DoRA a row of W + factor B A is
    scaled to its own length m; the length it had takes no part in the gradient (Liu et al. 2024, equation 11).
    """

    def __init__(self, linear: Linear, places: Sequence[Place], settings: LoRASettings, shared: Adapters, like: Tensor) -> None:
        super().__init__()
        self.settings, self.shared, self.places = settings, shared, tuple(sorted(places, key=lambda place: place.start))
        self.out_features = linear.out_features
        squares = row_squares(linear.weight, like.dtype) if settings.dora else None
        self.register_buffer("squares", squares, persistent=False)
        self.changes = nn.ModuleList(
            Change(
                place.rows,
                linear.in_features,
                settings.rank,
                None if squares is None else squares[place.start : place.start + place.rows].sqrt(),
                like,
            )
            for place in self.places
        )
        self._own = tuple(self.parameters())
        self._kept: tuple[Any, Factors] | None = None

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        if self._in_one_step and not self.shared.off:
            self._kept = None
            factors = [(change.a, change.b) for change in self.changes if isinstance(change, Change)]
            rows = [(place.start, place.start + place.rows) for place in self.places]
            return adapted_product(x.to(working_dtype(x)), linear.weight, linear.bias, factors, rows, self.settings.factor)
        y = affine(x, linear.weight, linear.bias)
        if self.shared.off:
            return y
        a, b, gain = self._factors(linear, working_dtype(x))
        read = F.dropout(x, self.settings.dropout, self.training) if self.settings.dropout else x
        y = add_product(y, affine(read.to(a.dtype), a), b)
        if gain is None:
            return y
        scaled = y * gain
        return scaled if linear.bias is None else scaled - (gain - 1) * linear.bias

    @property
    def _in_one_step(self) -> bool:
        """Whether this is a pass of plain LoRA in training, outside a compiler's trace, which makes one step of the parts by itself."""
        settings = self.settings
        plain = not settings.dora and not (settings.dropout and self.training)
        return plain and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def fused(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [R, in] and factor B [out, R] of all changes together, R the sum of their ranks."""
        changes: list[Any] = list(self.changes)
        a = changes[0].a if len(changes) == 1 else torch.cat([change.a for change in changes])
        if len(changes) == 1 and changes[0].b.shape[0] == self.out_features:
            b = changes[0].b
        else:
            rank = self.settings.rank
            columns = [
                F.pad(change.b, (0, 0, place.start, self.out_features - place.start - place.rows))
                for change, place in zip(changes, self.places, strict=True)
            ]
            assert a.shape[0] == rank * len(columns)
            b = torch.cat(columns, 1)
        return a.to(dtype), (b * self.settings.factor).to(dtype)

    def _factors(self, linear: Linear, dtype: torch.dtype) -> Factors:
        """What a pass multiplies with. Between passes of an engine it is kept; any other pass may be one before the parameters are updated,
        which fused optimisers do without raising a tensor's version."""
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            self._kept = None
            return self._make_factors(linear, dtype)
        key = (dtype, [0 if p.is_inference() else p._version for p in self._own], self._own[0].device)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._make_factors(linear, dtype)
        return self._kept[1]

    def _make_factors(self, linear: Linear, dtype: torch.dtype) -> Factors:
        a, b = self.fused(dtype)
        return a, b, self.gain(linear).to(dtype) if self.settings.dora else None

    def gain(self, linear: Linear) -> Tensor:
        """DoRA's factor a row [out], magnitude / |W + factor B A|, 1 for rows without a change; the norm's gradient is cut."""
        squares = self.get_buffer("squares")
        with torch.no_grad(), torch.autocast(squares.device.type, enabled=False):
            a, b = self.fused(squares.dtype)
            crossed = affine(a, linear.weight if linear.packed else linear.weight.to(a.dtype)).t()  # W A^T [out, R]
            norm = (squares + (b * (2 * crossed + b @ (a @ a.t()))).sum(-1)).sqrt()
        lengths = norm
        for change, place in zip(self.changes, self.places, strict=True):
            assert isinstance(change, Change)
            assert change.magnitude is not None
            whole = place.rows == self.out_features
            end = place.start + place.rows
            lengths = change.magnitude if whole else torch.cat([lengths[: place.start], change.magnitude, lengths[end:]])
        return lengths / norm

    @torch.no_grad()
    def merged(self, linear: Linear, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the map with its changes in it, from its own weight in a wide dtype."""
        a, b = self.fused(weight.dtype)
        weight = weight + b @ a
        return (weight if not self.settings.dora else weight * self.gain(linear).to(weight.dtype)[:, None]), linear.bias


def add_product(y: Tensor, z: Tensor, b: Tensor) -> Tensor:
    """y [..., O] + z [..., R] times the transpose of b [O, R]."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), b.t()).view(y.shape)
    return y + affine(z, b)
