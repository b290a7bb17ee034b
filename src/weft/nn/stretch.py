"""Stretches of equal layers that run as one kernel call: incremental passes of a quantised Llama on a CPU.

The naive twin is the blocks themselves, one after another, and they have the same bits. What is saved is the way from Python to a
kernel and back, which for a single token is longer than the kernels are.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from weft import kernels
from weft.nn.attend_in_place import WIDTHS, AttendSettings, asked_positions
from weft.nn.attention import Attention
from weft.nn.block import PreBlock
from weft.nn.channel import Gated
from weft.nn.linear import Linear
from weft.nn.norm import RMSNorm
from weft.nn.packed import ROWS, PackedWeight
from weft.nn.rope import Rope
from weft.nn.step import Step

Operands = tuple[Tensor, Tensor, Tensor | None, int, float]


class Numbers(NamedTuple):
    """What the layers of a stretch have in common; bits and offsets a matrix, epsilon a norm."""

    settings: AttendSettings
    groups: int
    width: int
    rope: str | None
    bits: tuple[int, ...]
    offsets: tuple[float, ...]
    epsilon: tuple[float, ...]
    unit_offset: bool


class Stretch:
    """Layers first, first + 1, ... of a model, all of one kind."""

    def __init__(self, first: int, blocks: Sequence[Any], numbers: Numbers) -> None:
        self.first, self.blocks, self.numbers = first, blocks, numbers
        self.count = len(blocks)
        self.rope: Rope | None = blocks[0].mixer.rope
        self._packed: list[Any] = [linear.weight for block in blocks for linear in _linears(block)]
        self._norms = [norm for block in blocks for norm in (block.mixer_norm, block.channel_norm)]
        self._operands: list[Operands] = []
        self._weights: list[Tensor] = []

    def reads(self, views: Sequence[dict[str, Any]]) -> bool:
        """Whether the kernel can read state as it lies behind these views."""
        return views[self.first]["mixer"]["k"].dtype in kernels.DTYPES

    def run(self, x: Tensor, step: Step, views: Sequence[dict[str, Any]]) -> Tensor:
        """x [B, T, D] after the last of these layers; keys and values are written into their state."""
        mine = [layer["mixer"] for layer in views[self.first : self.first + self.count]]
        keys, values = [own["k"].buffer for own in mine], [own["v"].buffer for own in mine]
        at, numbers = mine[0]["k"].locate(step), self.numbers
        cos, sin = (None, None) if self.rope is None else self.rope.tables(step)
        heads, scale, window, softcap = numbers.settings
        y: Tensor = kernels.ops.layers(
            x, self._tensors(), keys, values, cos, sin, heads, numbers.groups, at.head_stride, at.slots, at.starts, at.positions,
            asked_positions(step), scale, window, softcap, numbers.bits, numbers.offsets, numbers.epsilon, numbers.unit_offset,
            kernels.coarse(),
        )  # fmt: skip
        return y

    def _tensors(self) -> list[Tensor]:
        """The weights of all layers in the kernel's order, gathered anew where a matrix has moved."""
        operands = [packed._operands for packed in self._packed]
        if len(operands) != len(self._operands) or any(new is not old for new, old in zip(operands, self._operands, strict=True)):
            self._operands, self._weights = operands, []
            per_layer = len(operands) // self.count
            for i in range(self.count):
                self._weights += [norm.weight for norm in self._norms[2 * i : 2 * i + 2]]
                for codes, scale, minimum, _, _ in operands[per_layer * i : per_layer * (i + 1)]:
                    self._weights += [codes, scale, scale[:0] if minimum is None else minimum]
        return self._weights


def find_stretches(blocks: nn.ModuleList) -> dict[int, Stretch]:
    """The stretches of two layers or more that a model has, by their first layer."""
    found, first = {}, 0
    for numbers, group in groupby(blocks, _numbers):
        members: list[Any] = list(group)
        if numbers is not None and len(members) > 1:
            found[first] = Stretch(first, members, numbers)
        first += len(members)
    return found


def _linears(block: Any) -> tuple[Linear, ...]:
    return block.mixer.qkv, block.mixer.out, block.channel.gate_up, block.channel.down


def _numbers(block: nn.Module) -> Numbers | None:
    """What a block has in common with its neighbours; None where it is of another kind than the kernel computes."""
    if type(block) is not PreBlock or block.names != ["mixer", "channel"] or block.behind is not None:
        return None
    layer: Any = block
    mixer, channel, norms = layer.mixer, layer.channel, (layer.mixer_norm, layer.channel_norm)
    if type(mixer) is not Attention or type(channel) is not Gated or not all(isinstance(norm, RMSNorm) for norm in norms):
        return None
    if (
        mixer.q_norm is not None
        or not mixer.kernel_knows
        or mixer.prefix is not None
        or mixer.width not in WIDTHS
        or channel.spec.activation != "silu"
        or norms[0].unit_offset != norms[1].unit_offset
    ):
        return None
    weights: list[Any] = [linear.weight for linear in _linears(block)]
    if any(linear.bias is not None or linear.adapter is not None for linear in _linears(block)) or not all(
        isinstance(weight, PackedWeight) for weight in weights
    ):
        return None
    if any(weight.kind == "nf4" or weight.shape[0] % ROWS for weight in weights):
        return None
    rope = None if mixer.rope is None else mixer.rope.key
    bits, offsets = tuple(weight.bits for weight in weights), tuple(weight.offset for weight in weights)
    return Numbers(mixer.settings, mixer.groups, mixer.width, rope, bits, offsets, tuple(norm.eps for norm in norms), norms[0].unit_offset)
