"""A matrix in 4 or 8 bits, as it is stored, as it is multiplied, and as it is handed back in full.

`PackedWeight` is what every form has in common; `TiledWeight` is the one that the kernels multiply, and `weft.nn.packed_nf4` has QLoRA's.
A packed weight is never trained, but gradients pass through it to what was multiplied.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import kernels
from weft.nn.precision import working_dtype
from weft.spec.quant import GROUP, Quant, QuantType

ROWS = 16  # of a tile
OFFSET = {"int8": 128.0, "int4": 8.0}
# The levels of NF4: quantiles of the normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
AT_ONCE = 1 << 19  # weights that are written out together: what lies between codes and values stays in a cache

Reader = Callable[[Sequence[Tensor], int, int, torch.dtype], Tensor]
READERS: dict[str, Reader] = {}
"""By the layout of a packed weight, what writes some of its rows out: (stored tensors, first row, number of rows, float32 or float64)."""


class PackedWeight(nn.Module, ABC):
    """A weight [rows, columns] of which only codes and scales exist. It stands where a float parameter `weight` stood.

    quant   how it is packed, and its type again as `kind`.      layout  which of `READERS` reads it.
    `dtype` is that of what `rows` gives back; it follows the model around it.
    """

    like: Tensor

    def __init__(self, rows: int, columns: int, quant: Quant, layout: str) -> None:
        super().__init__()
        assert columns % quant.group == 0, f"rows of {columns} weights do not divide into groups of {quant.group}"
        self.shape, self.quant = torch.Size((rows, columns)), quant
        self.kind, self.layout = quant.type, layout  # plain, as a compiler does not look into specs
        self.register_buffer("like", torch.empty(0), persistent=False)

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """What a file keeps of it, by name."""

    @abstractmethod
    def fill(self, codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> "PackedWeight":
        """Take codes uint8 [rows, columns], scales and minima [rows, groups]; returns itself."""

    @abstractmethod
    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `fill` took, as it is stored."""

    def gather_operands(self) -> None:
        """Called when the stored tensors have moved."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        """Moves with the model, but what is stored keeps its bits when the model changes its dtype."""
        self.like = fn(self.like)
        for name, buffer in self.stored().items():
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[buffer.element_size()]
            setattr(self, name, fn(buffer.view(bits)).view(buffer.dtype))
        self.gather_operands()
        return self

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        return next(iter(self.stored().values())).device

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.stored().values())

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix in the model's dtype: [*ids.shape, columns]; a token table's look-up."""

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix [rows, columns], computed in float32 (float64 stays) and rounded to `dtype`."""
        return _written_out(list(self.stored().values()), self.layout, 0, self.shape[0], self.shape[1], dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b for x [..., columns], in x's dtype, or autocast's where it is on."""
        y = self.part(0, self.shape[0], x)
        return y if bias is None else y + bias.to(y.dtype)

    def part(self, first: int, rows: int, x: Tensor) -> Tensor:
        """x times the transpose of `rows` rows from `first` on, both multiples of 16: one of several matrices below each other.

        Where gradients are recorded nothing is kept for the backward pass but what is stored anyway: it writes the matrix out again.
        """
        x, stored = x.to(working_dtype(x)), list(self.stored().values())
        if torch.is_grad_enabled():
            y: Tensor = _product(x, stored, self.layout, first, rows, self.shape[1], False)
            return y
        return F.linear(x, _written_out(stored, self.layout, first, rows, self.shape[1], x.dtype))

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.layout}"


def _written_out(stored: Sequence[Tensor], layout: str, first: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows [rows, columns] in `dtype`, a stretch at a time."""
    wide, read = torch.float64 if dtype == torch.float64 else torch.float32, READERS[layout]
    step = max(1, AT_ONCE // columns // ROWS) * ROWS
    if rows <= step or torch.compiler.is_compiling():
        return read(stored, first, rows, wide).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=stored[0].device)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        out[start : start + count] = read(stored, first + start, count, wide)
    return out


@torch.library.custom_op("weft::packed_product", mutates_args=())
def _product(x: Tensor, stored: Sequence[Tensor], layout: str, first: int, rows: int, columns: int, transposed: bool) -> Tensor:
    """x W^T, or x W where `transposed`. One operator to a compiler, which would otherwise keep the matrix for the backward pass."""
    weight = _written_out(stored, layout, first, rows, columns, x.dtype)
    return F.linear(x, weight.t() if transposed else weight)


@_product.register_fake
def _(x: Tensor, stored: Sequence[Tensor], layout: str, first: int, rows: int, columns: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns if transposed else rows)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, stored, *ctx.place, transposed = inputs
    assert not transposed, "the transposed product is a gradient and has none of its own"
    ctx.save_for_backward(*stored)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    stored = list(ctx.saved_tensors)
    dx = _product(dy.contiguous(), stored, *ctx.place, True) if ctx.needs_input_grad[0] else None
    return dx, [None] * len(stored), None, None, None, None, None


_product.register_autograd(_gradient, setup_context=_keep)


class TiledWeight(PackedWeight):
    """Groups of 32 weights of a row share a scale s and, in one form, a minimum m, both float16:

        int8   s (code - 128)                      4 bits around zero   s (code - 8)
        int4   s code + m, or around zero          nf4                  s LEVELS[code]

    The codes lie in tiles of 16 rows and one group, byte by byte in the order in which the kernel consumes them; `kernels/matmul.cpp`
    draws the layout. Rows are filled up to a multiple of 16 with scales of zero.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    def __init__(self, rows: int, columns: int, kind: QuantType, minimum: bool = False) -> None:
        super().__init__(rows, columns, Quant(type=kind, minimum=minimum), f"{kind} with minimum" if minimum else kind)
        self.bits = 8 if kind == "int8" else 4
        self.offset = 0.0 if minimum else OFFSET.get(kind, 0.0)
        blocks, groups = -(-rows // ROWS), columns // GROUP
        self.register_buffer("codes", torch.zeros(blocks, groups, GROUP * self.bits // 32, ROWS, 4, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(blocks, groups, ROWS, dtype=torch.float16))
        self.register_buffer("minimum", torch.zeros(blocks, groups, ROWS, dtype=torch.float16) if minimum else None)
        self.gather_operands()

    def gather_operands(self) -> None:
        """What the kernel takes, in one plain tuple: four look-ups of a module's buffers are four microseconds a product."""
        self._operands = (self.codes, self.scale, self.minimum, self.bits, self.offset)

    def stored(self) -> dict[str, Tensor]:
        named = {"codes": self.codes, "scale": self.scale, "minimum": self.minimum}
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    def fill(self, codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> "TiledWeight":
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
        codes, scale, minimum = _read(self, torch.arange(self.shape[0], device=self.codes.device))
        return codes, scale, minimum

    def rows(self, ids: Tensor) -> Tensor:
        codes, scale, minimum = _read(self, ids.reshape(-1))
        grouped = _values(self.layout, codes.unflatten(1, (-1, GROUP)), scale.float(), None if minimum is None else minimum.float())
        return grouped.to(self.dtype).view(*ids.shape, -1)

    def part(self, first: int, rows: int, x: Tensor) -> Tensor:
        assert first % ROWS == 0
        assert rows % ROWS == 0 or first + rows == self.shape[0]
        if self.kind != "nf4" and kernels.usable(x):
            blocks = slice(first // ROWS, -(-(first + rows) // ROWS))
            minimum = None if self.minimum is None else self.minimum[blocks]
            y: Tensor = kernels.ops.quantised_linear(
                x, self.codes[blocks], self.scale[blocks], minimum, self.bits, self.offset, kernels.coarse()
            )
            return y if y.shape[-1] == rows else y[..., :rows]
        return super().part(first, rows, x)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b for x [..., columns], in x's dtype; row by row the same bits whatever the other rows are."""
        if self.kind != "nf4" and kernels.usable(x):
            y: Tensor = kernels.ops.quantised_linear(x, *self._operands, kernels.coarse())
            y = y if y.shape[-1] == self.shape[0] else y[..., : self.shape[0]]
            return y if bias is None else y + bias
        return super().multiply(x, bias)


def _read(packed: TiledWeight, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, columns], scales and minima [N, groups] of single rows."""
    block, lane = ids // ROWS, ids % ROWS
    codes = packed.codes[block, :, :, lane]  # [N, groups, chunks, 4]
    if packed.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 3)
    minimum = None if packed.minimum is None else packed.minimum[block, :, lane]
    return codes.flatten(1), packed.scale[block, :, lane], minimum


def _values(layout: str, codes: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """What codes [..., groups, 32] stand for, in the dtype of the scales [..., groups]."""
    if layout == "nf4":
        levels = torch.tensor(NF4, dtype=scale.dtype, device=codes.device)[codes.int()]
    else:
        levels = codes.to(scale.dtype) - (OFFSET[layout] if minimum is None else 0.0)
    grouped = levels * scale[..., None]
    return grouped if minimum is None else grouped + minimum[..., None]


def _reader(layout: str, bits: int) -> Reader:
    def read(stored: Sequence[Tensor], first: int, rows: int, wide: torch.dtype) -> Tensor:
        blocks = slice(first // ROWS, -(-(first + rows) // ROWS))
        codes = stored[0][blocks].permute(0, 3, 1, 2, 4)  # [blocks, 16, groups, chunks, 4]
        if bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 4)
        scale, *minimum = (values[blocks].transpose(1, 2).flatten(0, 1).to(wide) for values in stored[1:])
        grouped = codes.reshape(*scale.shape, GROUP)
        return _values(layout, grouped, scale, minimum[0] if minimum else None).flatten(1)[:rows]

    return read


for _layout in ("int8", "int4", "int4 with minimum", "nf4"):
    READERS[_layout] = _reader(_layout, 8 if _layout == "int8" else 4)


def multiply_gated(x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
    """down(silu(gate(x)) * up(x)) in one kernel call where the weights allow it, in three where they do not."""
    if (
        not isinstance(gate_up, TiledWeight)
        or not isinstance(down, TiledWeight)
        or gate_up.kind == "nf4"
        or gate_up.kind != down.kind
        or gate_up.shape[0] % ROWS
        or down.shape[0] % ROWS
    ):
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
