"""The block formats of GGUF: bytes to float32, and float32 to Q8_0. All vectorised over blocks.

Each decoder takes uint8 [n, bytes of a block] and returns float32 [n, numbers of a block], equal bit for bit to ggml's reference.
Formats are as in ggml's `ggml-common.h`: d and m are float16 scale and minimum, q the small integers. In the formats of 32 a block is
q * d (+ m); in the "K" formats of 256 a block holds 8 or 16 sub-blocks with scales of their own, themselves multiples of d and m.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Non-uniform levels of the IQ4 formats (ggml's `kvalues_iq4nl`).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block, as float32 [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(packed: Tensor, width: int, bits: int) -> Tensor:
    """Unpack fields of `bits` bits: every `width` bytes give 8/bits groups of `width` numbers, lowest bits first. -> uint8 [n, ...]"""
    n, shifts = packed.shape[0], torch.arange(0, 8, bits, dtype=torch.uint8)
    groups: Tensor = packed.reshape(n, -1, 1, width) >> shifts[:, None]
    return groups.bitwise_and_(2**bits - 1).view(n, -1)


def _bits(packed: Tensor) -> Tensor:
    """The 32 bits of every 4 bytes, lowest first. -> uint8 [n, 32]"""
    return ((packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(packed.shape[0], -1)


def nibbles(packed: Tensor) -> Tensor:
    """The 32 codes of every 16 bytes of a Q4 block: uint8 [n, 16] -> uint8 [n, 32]."""
    return _fields(packed, 16, 4)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return (_fields(blocks[:, 2:], 16, 4).float() - 8).mul_(half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _fields(blocks[:, 4:], 16, 4).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, 6:], 16, 4) | (_bits(blocks[:, 2:6]) << 4)
    return (q.float() - 16).mul_(half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, 8:], 16, 4) | (_bits(blocks[:, 4:8]) << 4)
    return q.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def _iq4_nl(blocks: Tensor) -> Tensor:
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32)
    return levels[_fields(blocks[:, 2:], 16, 4).int()].mul_(half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    n = blocks.shape[0]
    low = _fields(blocks[:, 4:8], 1, 4)
    high = _fields(blocks[:, 2:4], 1, 2)
    scales = half(blocks, 0) * ((low | (high << 4)).float() - 32)
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32)
    q = levels[_fields(blocks[:, 8:], 16, 4).int()].view(n, 8, 32)
    return q.mul_(scales[:, :, None]).view(n, 256)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and minima out of 12 bytes: four of each whole, four split into low and high bits. -> float32 [n, 8]"""
    d, m, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([d & 63, (low & 15) | ((d >> 2) & 48)], 1)
    minima = torch.cat([m & 63, (low >> 4) | ((m >> 2) & 48)], 1)
    return scales.float(), minima.float()


def _scaled_minus_minimum(blocks: Tensor, q: Tensor) -> Tensor:
    """Q4_K and Q5_K alike: sub-blocks of 32, scale and minimum each."""
    scales, minima = _k_scales(blocks[:, 4:16])
    scales, minima = scales * half(blocks, 0), minima * half(blocks, 2)
    q = q.float().view(-1, 8, 32)
    return q.mul_(scales[:, :, None]).sub_(minima[:, :, None]).view(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_minus_minimum(blocks, _fields(blocks[:, 16:], 32, 4))


def _q5_k(blocks: Tensor) -> Tensor:
    return _scaled_minus_minimum(blocks, _fields(blocks[:, 48:], 32, 4) | (_fields(blocks[:, 16:48], 32, 1) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, :128], 64, 4) | (_fields(blocks[:, 128:192], 32, 2) << 4)
    scales = blocks[:, 192:208].view(torch.int8).float() * half(blocks, 208)
    return (q.float() - 32).view(-1, 16, 16).mul_(scales[:, :, None]).view(-1, 256)


def _q2_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, :16]
    scales = (packed & 15).float() * half(blocks, 80)
    minima = (packed >> 4).float() * half(blocks, 82)
    q = _fields(blocks[:, 16:80], 32, 2).float().view(-1, 16, 16)
    return q.mul_(scales[:, :, None]).sub_(minima[:, :, None]).view(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    low, high = _fields(blocks[:, 96:104], 8, 4), _fields(blocks[:, 104:108], 4, 2)
    scales = ((low | (high << 4)).float() - 32) * half(blocks, 108)
    # A cleared bit of the high mask stands for -4.
    q = _fields(blocks[:, 32:96], 32, 2).float() - (1 - _fields(blocks[:, :32], 32, 1)).mul_(4).float()
    return q.view(-1, 16, 16).mul_(scales[:, :, None]).view(-1, 256)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip


def quantize_q8_0(values: Tensor) -> Tensor:
    """float32 [n, 32] to Q8_0 blocks, uint8 [n, 34]: d = max|x| / 127 as float16, q = x / d rounded half away from zero.

    Equal bit for bit to ggml's `quantize_row_q8_0_ref`. A block that holds an infinity or a NaN gets a non-finite d.
    """
    d = values.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    scaled = values * inverse
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = (whole + (2 * (magnitude - whole)).floor()) * scaled.sign()
    # Below 3e-39 the inverse overflows; d itself is then zero in float16, so any q will do, but it has to be a number.
    q = rounded.nan_to_num(0, 127, -127).clamp(-127, 127).to(torch.int8)
    return torch.cat([d.half().view(torch.uint8), q.view(torch.uint8)], 1)
