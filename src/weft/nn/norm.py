"""Normalisation layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import kernels
from weft.spec import LayerNorm as LayerNormSpec
from weft.spec import RMSNorm as RMSNormSpec
from weft.spec import Spec


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al. 2016, equation 3)."""

    def __init__(self, spec: LayerNormSpec, dim: int) -> None:
        super().__init__()
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if spec.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, equation 4), normalised in float32.

    In Gemma's form the factor is 1 + weight and is applied in float32 too.
    """

    def __init__(self, spec: RMSNormSpec, dim: int) -> None:
        super().__init__()
        self.eps, self.unit_offset = spec.eps, spec.unit_offset
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        (nn.init.zeros_ if self.unit_offset else nn.init.ones_)(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if kernels.usable(x, self.weight):
            y: Tensor = kernels.ops.rms_norm(x, self.weight, self.eps, self.unit_offset)
            return y
        wide = x if x.dtype == torch.float64 else x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.unit_offset:
            return (normal * (1 + self.weight.to(wide.dtype))).to(x.dtype)
        return normal.to(x.dtype) * self.weight


def build_norm(spec: Spec, dim: int) -> nn.Module:
    if isinstance(spec, LayerNormSpec):
        return LayerNorm(spec, dim)
    assert isinstance(spec, RMSNormSpec)
    return RMSNorm(spec, dim)
