"""Rotary positions: pairs of channels turned by an angle that grows with the position."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weft.nn.step import Step
from weft.spec import LinearScaling, Llama3Scaling, YarnScaling
from weft.spec import Rope as RopeSpec


class Rope(nn.Module):
    """cos and sin of position * frequency (Su et al. 2021, equation 15), the same for every layer with the same spec.

    The frequencies are float32 whatever the model's dtype: in bfloat16 neighbouring positions would coincide.
    """

    inverse_frequencies: Tensor

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        super().__init__()
        self.spec, self.head_dim = spec, head_dim
        self.factor = attention_factor(spec)
        self.key = f"rope {head_dim} {spec!r}"  # a string, because the compiler cannot look into a spec's hash
        self.register_buffer("inverse_frequencies", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.inverse_frequencies.is_meta:
            values = inverse_frequencies(self.spec, self.head_dim)
            self.inverse_frequencies = values.to(self.inverse_frequencies.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rope":
        super()._apply(fn, recurse)
        self.inverse_frequencies = self.inverse_frequencies.float()
        self.reset_parameters()
        return self

    def tables(self, step: Step) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [B, T, 1, head_dim / 2], for this step's positions."""
        return step.once(self.key, lambda: self._tables(step.positions))

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None, None].float() * self.inverse_frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, T, H, D] by the angles: channel i of the first half pairs with channel i of the second."""
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """Radians a position for each pair of channels, float32 [head_dim / 2], with the spec's context scaling applied."""
    with torch.device("cpu"):
        plain: Tensor = 1.0 / spec.base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        scaling = spec.scaling
        if scaling is None:
            return plain
        if isinstance(scaling, LinearScaling):
            return plain / scaling.factor
        if isinstance(scaling, Llama3Scaling):
            return _llama3(plain, scaling)
        return _yarn(plain, scaling, spec.base, head_dim)


def attention_factor(spec: RopeSpec) -> float:
    """YaRN's factor on cos and sin (Peng et al. 2023, equation 22); 1 for every other scaling."""
    if not isinstance(spec.scaling, YarnScaling):
        return 1.0
    given = spec.scaling.attention_factor
    return given if given is not None else 0.1 * math.log(spec.scaling.factor) + 1.0 if spec.scaling.factor > 1 else 1.0


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide frequencies whose wavelength exceeds the original context / low factor; blend linearly up to the high factor."""
    rotations = scaling.original_context * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((rotations - scaling.low_freq_factor) / span).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(plain: Tensor, scaling: YarnScaling, base: float, head_dim: int) -> Tensor:
    """NTK-by-parts (Peng et al. 2023, section 3.2): a ramp over channel indices between the two rotation counts."""

    def channel(rotations: float) -> float:
        return head_dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), head_dim - 1)
    span: Any = high - low if high != low else 0.001
    interpolate = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    scaled: Tensor = interpolate * plain / scaling.factor + (1 - interpolate) * plain
    return scaled
