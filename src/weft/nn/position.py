"""Positions added to the embedding."""

import torch
from torch import Tensor, nn

from weft.nn.fill import fill_normal
from weft.spec import Learned as LearnedSpec
from weft.spec import Sinusoidal as SinusoidalSpec
from weft.spec import Spec


class Learned(nn.Module):
    """A trained vector a position (GPT). Padding may stand past the table's end; it reads the last row and nobody reads it."""

    def __init__(self, spec: LearnedSpec, dim: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(spec.length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_normal(self.weight, self.std)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + nn.functional.embedding(positions.clamp(max=self.weight.shape[0] - 1), self.weight)


class Sinusoidal(nn.Module):
    """Channel 2i holds sin(position / base^(2i/dim)), channel 2i + 1 the cosine (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, spec: SinusoidalSpec, dim: int) -> None:
        super().__init__()
        self.base, self.dim = spec.base, dim

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        channels = torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32)
        angles = positions[..., None].float() / self.base ** (channels / self.dim)
        waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., : self.dim]
        return x + waves.to(x.dtype)


def build_position(spec: Spec, dim: int, std: float) -> nn.Module | None:
    if isinstance(spec, LearnedSpec):
        return Learned(spec, dim, std)
    return Sinusoidal(spec, dim) if isinstance(spec, SinusoidalSpec) else None
