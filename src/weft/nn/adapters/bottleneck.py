"""Bottleneck adapters: small units behind the parts of every layer."""

import torch
from torch import Tensor, nn

from weft.nn.adapters.shared import Adapters
from weft.nn.channel import ACTIVATIONS
from weft.nn.linear import affine
from weft.nn.precision import working_dtype
from weft.spec.adapters import Bottleneck as BottleneckSettings


class BottleneckAdapter(nn.Module):
    """h + up(activation(down(h))) (Houlsby et al. 2019, section 2.1). `up` starts at zero, so that the model starts as it was."""

    def __init__(self, dim: int, settings: BottleneckSettings, shared: Adapters, like: Tensor) -> None:
        super().__init__()
        self.shared, self.activation = shared, ACTIVATIONS[settings.activation]
        self.down = nn.Parameter(like.new_empty(settings.size, dim))
        self.down_bias = nn.Parameter(like.new_zeros(settings.size))
        self.up = nn.Parameter(like.new_zeros(dim, settings.size))
        self.up_bias = nn.Parameter(like.new_zeros(dim))

    def draw(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.down.copy_((2 * torch.rand(self.down.shape, generator=generator) - 1) * self.down.shape[1] ** -0.5)

    def forward(self, h: Tensor) -> Tensor:
        if self.shared.off:
            return h
        dtype = working_dtype(h)
        down, down_bias, up, up_bias = (p.to(dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        return h + affine(self.activation(affine(h.to(dtype), down, down_bias)), up, up_bias).to(h.dtype)
