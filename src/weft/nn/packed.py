"""A matrix in 4 or 8 bits, as it is stored, as it is multiplied, and as it is handed back in full.

Groups of 32 weights of a row share a scale s and, in one form, a minimum m, both float16:

    int8   s (code - 128)                      4 bits around zero   s (code - 8)
    int4   s code + m, or around zero          nf4                  s LEVELS[code]

The codes lie in tiles of 16 rows and one group, byte by byte in the order in which the kernel consumes them; `kernels/matmul.cpp` draws
the layout. Rows are filled up to a multiple of 16 with scales of zero.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import kernels
from weft.spec.quant import GROUP, QuantType

ROWS = 16  # of a tile
OFFSET = {"int8": 128.0, "int4": 8.0}
# The levels of NF4: quantiles of the normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class PackedWeight(nn.Module):
    """A weight [rows, columns] of which only codes, scales and minima exist. It stands where a float parameter `weight` stood.

    kind     "int8", "int4" or "nf4".       minimum  int4 only: codes count from the group's minimum.
    `dtype` is that of what `rows` gives back; it follows the model around it.
    """

    codes: Tensor
    scale: Tensor
    like: Tensor
    minimum: Tensor | None

    def __init__(self, rows: int, columns: int, kind: QuantType, minimum: bool = False) -> None:
        super().__init__()
        assert columns % GROUP == 0, f"rows of {columns} weights do not divide into groups of {GROUP}"
        self.shape, self.kind = torch.Size((rows, columns)), kind
        self.bits = 8 if kind == "int8" else 4
        self.offset = 0.0 if minimum else OFFSET.get(kind, 0.0)
        blocks, groups = -(-rows // ROWS), columns // GROUP
        self.register_buffer("codes", torch.zeros(blocks, groups, GROUP * self.bits // 32, ROWS, 4, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(blocks, groups, ROWS, dtype=torch.float16))
        self.register_buffer("minimum", torch.zeros(blocks, groups, ROWS, dtype=torch.float16) if minimum else None)
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.gather_operands()

    def gather_operands(self) -> None:
        """What the kernel takes, in one plain tuple: four look-ups of a module's buffers are four microseconds a product."""
        self._operands = (self.codes, self.scale, self.minimum, self.bits, self.offset)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        """Moves with the model, but scales keep their bits when the model changes its dtype."""
        self.like = fn(self.like)
        self.codes = fn(self.codes)
        self.scale = fn(self.scale.view(torch.int16)).view(torch.float16)
        if self.minimum is not None:
            self.minimum = fn(self.minimum.view(torch.int16)).view(torch.float16)
        self.gather_operands()
        return self

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.stored().values())

    def stored(self) -> dict[str, Tensor]:
        """What a file keeps of it, by name."""
        named = {"codes": self.codes, "scale": self.scale, "minimum": self.minimum}
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    def fill(self, codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> "PackedWeight":
        """Take codes uint8 [rows, columns], scales and minima [rows, columns / 32]; returns itself."""
        assert codes.shape == self.shape
        assert (minimum is None) == (self.minimum is None)
        self.codes.copy_(_tiles(codes, self.bits))
        self.scale.copy_(_by_tile(scale))
        if minimum is not None and self.minimum is not None:
            self.minimum.copy_(_by_tile(minimum))
        return self

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `fill` took: codes uint8 [rows, columns], scales and minima float16 [rows, columns / 32]."""
        codes, scale, minimum = self._read(torch.arange(self.shape[0], device=self.codes.device))
        return codes, scale, minimum

    def part(self, first: int, rows: int, x: Tensor) -> Tensor:
        """x times the transpose of `rows` rows from `first` on, both multiples of 16: one of several matrices below each other."""
        assert first % ROWS == rows % ROWS == 0
        if self.kind != "nf4" and kernels.usable(x):
            blocks = slice(first // ROWS, (first + rows) // ROWS)
            minimum = None if self.minimum is None else self.minimum[blocks]
            y: Tensor = kernels.ops.quantised_linear(
                x, self.codes[blocks], self.scale[blocks], minimum, self.bits, self.offset, kernels.coarse()
            )
            return y
        return F.linear(x, self.rows(torch.arange(first, first + rows, device=x.device)).to(x.dtype))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix in the model's dtype: [*ids.shape, columns]; a token table's look-up."""
        codes, scale, minimum = self._read(ids.reshape(-1))
        values = self._values(codes, scale.float(), None if minimum is None else minimum.float())
        return values.to(self.dtype).view(*ids.shape, -1)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix [rows, columns], computed in float32 (float64 stays) and rounded to `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        codes, scale, minimum = self.unpack()
        return self._values(codes, scale.to(wide), None if minimum is None else minimum.to(wide)).to(dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b for x [..., columns], in x's dtype; row by row the same bits whatever the other rows are."""
        if self.kind != "nf4" and kernels.usable(x):
            y: Tensor = kernels.ops.quantised_linear(x, *self._operands, kernels.coarse())
            y = y if y.shape[-1] == self.shape[0] else y[..., : self.shape[0]]
            return y if bias is None else y + bias
        return F.linear(x, self.dequantise(x.dtype), bias)

    def _values(self, codes: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
        if self.kind == "nf4":
            levels = torch.tensor(NF4, dtype=scale.dtype, device=codes.device)[codes.int()]
        else:
            levels = codes.to(scale.dtype) - self.offset
        grouped = levels.unflatten(-1, (-1, GROUP)) * scale[..., None]
        return (grouped if minimum is None else grouped + minimum[..., None]).flatten(-2)

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        block, lane = ids // ROWS, ids % ROWS
        codes = self.codes[block, :, :, lane]  # [rows, groups, chunks, 4]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 3)
        minimum = None if self.minimum is None else self.minimum[block, :, lane]
        return codes.flatten(1), self.scale[block, :, lane], minimum

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.kind}{', minimum' if self.minimum is not None else ''}"


def multiply_gated(x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
    """down(silu(gate(x)) * up(x)) in one kernel call where the weights allow it, in three where they do not."""
    if gate_up.kind == "nf4" or gate_up.kind != down.kind or gate_up.shape[0] % ROWS or down.shape[0] % ROWS:
        return down.multiply(kernels.ops.silu_gate(gate_up.multiply(x)))
    y: Tensor = kernels.ops.gated_mlp(x, *gate_up._operands, *down._operands[:3], kernels.coarse())
    return y


def _tiles(codes: Tensor, bits: int) -> Tensor:
    tiles = _padded(codes).view(-1, ROWS, codes.shape[1] // GROUP, GROUP)
    if bits == 8:
        return tiles.unflatten(3, (8, 4)).permute(0, 2, 3, 1, 4)
    low, high = tiles.unflatten(3, (4, 2, 4)).permute(4, 0, 2, 3, 1, 5)
    return low | (high << 4)


def _by_tile(values: Tensor) -> Tensor:
    """[rows, groups] -> [rows / 16, groups, 16]."""
    return _padded(values).view(-1, ROWS, values.shape[1]).transpose(1, 2)


def _padded(values: Tensor) -> Tensor:
    return F.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
