"""QLoRA's storage: NF4 with double quantisation (Dettmers et al. 2023, section 3).

A block of 64 weights has the scale c2, the largest magnitude in it, and each weight is a code of 4 bits: w = c2 LEVELS[code]. The scales
are stored in 8 bits themselves, in blocks of 256 along the whole matrix: c2 = c1 DYNAMIC[code] + mean, where `mean` is that of all scales
of the matrix, which are positive, and c1 the largest magnitude of a block of them around it. 4.127 bits a weight.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from weft.nn.packed import NF4, READERS, PackedWeight
from weft.spec.quant import DOUBLE_GROUP, SCALES, Quant

LAYOUT = "nf4 twice"


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels of the 8-bit dynamic data type, float32, ascending (Dettmers 2016, section 2.1; Dettmers et al. 2022): seven decades
    with 1, 2, 4 ... 64 levels on each side of zero, zero, and one."""
    sides: list[float] = []
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, device="cpu")
        means = (bounds[:-1] + bounds[1:]) / 2
        sides += (10.0 ** (decade - 6) * means).tolist()
    return torch.tensor(sorted([*sides, *(-value for value in sides), 0.0, 1.0]), device="cpu")


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: the two weights that a byte of codes stands for, the first one in its upper half."""
    levels = torch.tensor(NF4, dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1)


class DoubleNF4Weight(PackedWeight):
    """A weight [rows, columns] in NF4 with double quantisation.

    codes       uint8 [rows, columns / 2], two weights a byte, the earlier one in its upper half.
    scale       uint8 [rows, columns / 64], codes of the blocks' scales.
    scale_max   float32 [blocks of 256 scales].       scale_mean  float32 [1].
    """

    codes: Tensor
    scale: Tensor
    scale_max: Tensor
    scale_mean: Tensor

    def __init__(self, rows: int, columns: int, quant: Quant) -> None:
        super().__init__(rows, columns, quant, LAYOUT)
        groups = columns // DOUBLE_GROUP
        self.register_buffer("codes", torch.zeros(rows, columns // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, groups, dtype=torch.uint8))
        self.register_buffer("scale_max", torch.zeros(-(-rows * groups // SCALES)))
        self.register_buffer("scale_mean", torch.zeros(1))

    def stored(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "scale_max": self.scale_max, "scale_mean": self.scale_mean}

    def fill(self, codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> "DoubleNF4Weight":
        """Take codes uint8 [rows, columns] and scales [rows, columns / 64], which are rounded in their turn; returns itself."""
        assert codes.shape == self.shape
        assert minimum is None
        self.codes.copy_((codes[:, ::2] << 4) | codes[:, 1::2])
        mean = scale.float().mean()
        rest = (scale.float() - mean).flatten()
        blocks = torch.nn.functional.pad(rest, (0, -len(rest) % SCALES)).view(-1, SCALES)
        most = blocks.abs().amax(1)
        levels = dynamic_levels().to(scale.device)
        nearest = torch.bucketize((blocks / most.clamp(min=1e-30)[:, None]).contiguous(), (levels[:-1] + levels[1:]) / 2)
        self.scale.copy_(nearest.flatten()[: len(rest)].view(scale.shape))
        self.scale_max.copy_(most)
        self.scale_mean.copy_(mean)
        return self

    def unpack(self) -> tuple[Tensor, Tensor, None]:
        """Codes uint8 [rows, columns], and the scales as they are stored, float32 [rows, columns / 64]."""
        codes = torch.stack([self.codes >> 4, self.codes & 15], 2).flatten(1)
        return codes, _scales(list(self.stored().values()), 0, self.shape[0], torch.float32), None

    def rows(self, ids: Tensor) -> Tensor:
        flat, groups = ids.reshape(-1, 1), self.scale.shape[1]
        place = flat * groups + torch.arange(groups, device=ids.device)
        level = dynamic_levels().to(self.device)[self.scale[flat[:, 0]].int()]
        scale = level * self.scale_max[place // SCALES] + self.scale_mean
        return _weights(self.codes[flat[:, 0]], scale).to(self.dtype).view(*ids.shape, -1)


def _scales(stored: Sequence[Tensor], first: int, rows: int, wide: torch.dtype) -> Tensor:
    """Scales [rows, groups] of some rows."""
    _, codes, most, mean = stored
    groups = codes.shape[1]
    begin, end = first * groups, (first + rows) * groups
    levels = dynamic_levels().to(codes.device, wide)[codes[first : first + rows].int()].flatten()
    place = torch.arange(begin, end, device=codes.device)
    return (levels * most.to(wide)[place // SCALES] + mean.to(wide)).view(rows, groups)


def _weights(codes: Tensor, scale: Tensor) -> Tensor:
    """Weights [rows, columns] of codes [rows, columns / 2] and scales [rows, groups], in the scales' dtype."""
    pairs = _pairs(scale.dtype, codes.device)
    if scale.dtype == torch.float32:  # a pair is looked up as one number of 8 bytes
        values = pairs.view(torch.int64)[:, 0].index_select(0, codes.flatten().int()).view(torch.float32)
    else:
        values = pairs[codes.flatten().int()]
    return (values.view(*scale.shape, DOUBLE_GROUP) * scale[..., None]).flatten(1)


def _read(stored: Sequence[Tensor], first: int, rows: int, wide: torch.dtype) -> Tensor:
    return _weights(stored[0][first : first + rows], _scales(stored, first, rows, wide))


READERS[LAYOUT] = _read
