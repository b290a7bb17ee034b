"""IA3: factors of channels that linear maps read or write."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.errors import UserError
from weft.nn.adapters.shared import Adapters, Place
from weft.nn.linear import Linear, affine


class IA3Adapter(nn.Module):
    """y = l * (W x + b), or W (l * x) + b for a map whose input is scaled; l starts at one (Liu et al. 2022, section 3.3).

    `factors[i]` is the l of `places[i]`: [rows], or [in] where `inputs` says so.
    """

    def __init__(self, linear: Linear, places: Sequence[Place], inputs: Sequence[bool], shared: Adapters, like: Tensor) -> None:
        super().__init__()
        order = sorted(range(len(places)), key=lambda i: places[i].start)
        self.shared, self.places, self.inputs = shared, tuple(places[i] for i in order), tuple(inputs[i] for i in order)
        self.out_features = linear.out_features
        if any(self.inputs) and self.places[0].rows != linear.out_features:
            raise UserError(f"the input of {self.places[0].name} is also that of other maps and cannot be scaled alone; scale its output.")
        self.factors = nn.ParameterList(
            nn.Parameter(like.new_ones(linear.in_features if scaled else place.rows))
            for place, scaled in zip(self.places, self.inputs, strict=True)
        )

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        if self.shared.off:
            return affine(x, linear.weight, linear.bias)
        if self.inputs[0]:
            return affine(x * self.factors[0].to(x.dtype), linear.weight, linear.bias)
        y = affine(x, linear.weight, linear.bias)
        return y * self._whole().to(y.dtype)

    def _whole(self) -> Tensor:
        """The factors of all rows, 1 for those without one."""
        parts, at = [], 0
        for place, factor in zip(self.places, self.factors, strict=True):
            parts += [factor.new_ones(place.start - at), factor]
            at = place.start + place.rows
        parts.append(self.factors[0].new_ones(self.out_features - at))
        return torch.cat(parts)

    @torch.no_grad()
    def merged(self, linear: Linear, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the map with its factors in them, from its own weight in a wide dtype."""
        if self.inputs[0]:
            return weight * self.factors[0].to(weight.dtype), linear.bias
        scale = self._whole().to(weight.dtype)
        return weight * scale[:, None], None if linear.bias is None else linear.bias * scale.to(linear.bias.dtype)
