"""Decode state in 8 bits: each vector as signed bytes around zero, with its scale in bfloat16 behind them."""

import torch
from torch import Tensor

SCALE_BYTES = 2
_ABOVE = 1 + 2**-8  # rounding to bfloat16 then never makes a scale too small for its largest number


def encode(x: Tensor) -> Tensor:
    """x [..., width] of any float dtype as int8 [..., width + 2]. A vector's bytes depend on that vector alone."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) * _ABOVE / 127).bfloat16()
    codes = (wide / scale.float().clamp(min=1e-30)).round().to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What `encode` took, [..., width], within half of 1/127 of each vector's largest number."""
    scale = stored[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16)
    return (stored[..., :-SCALE_BYTES].float() * scale.float()).to(dtype)
