"""The quantised matrices of a GGUF file as they are: codes unchanged, float16 scales and minima unchanged, never dequantised.

For files whose layers are all Q4_0, all Q4_1 or all Q8_0 and whose tables are Q8_0 or float; others are dequantised on loading.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from weft.nn import Model
from weft.nn.packed import PackedWeight
from weft.spec import ModelSpec, Quant
from weft.weights.gguf import GGUF, TensorInfo
from weft.weights.gguf_blocks import half, nibbles
from weft.weights.gguf_header import BLOCK_TYPES_BY_NAME
from weft.zoo.rules import Cat, Interleave, One, Rule, Source

_QUANTS = {"Q4_0": ("int4", False), "Q4_1": ("int4", True), "Q8_0": ("int8", False)}
_FLOATS = ("F32", "F16", "BF16")
_TABLES = ("token_embd.weight", "output.weight")


def stored_quant(file: GGUF, spec: ModelSpec) -> Quant | None:
    """How the file's matrices would be kept as they are, or None where they are not all of one kind that we multiply."""
    types = {info.type for name, info in file.tensors.items() if len(info.shape) == 2 and name not in _TABLES}
    tables = {file.tensors[name].type for name in _TABLES if name in file.tensors}
    if len(types) != 1 or not types <= set(_QUANTS) or spec.dim % 32 or any(info.shape[-1] % 32 for info in _matrices(file)):
        return None
    if tables != {"Q8_0"} and not tables <= set(_FLOATS):
        return None
    kind, minimum = _QUANTS[types.pop()]
    return Quant(type="int8" if kind == "int8" else "int4", minimum=minimum, table="int8" if tables == {"Q8_0"} else "float")


def _matrices(file: GGUF) -> list[TensorInfo]:
    return [info for info in file.tensors.values() if len(info.shape) == 2]


def fill_packed(model: Model, rules: Iterable[Rule], file: GGUF) -> tuple[set[str], list[Rule]]:
    """Fill the model's packed weights; returns the stored names that were used, and the rules that are left for the rest."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    used: set[str] = set()
    left: list[Rule] = []
    for rule in rules:
        if not isinstance(rule, One | Cat) or rule.ours not in packed:
            left.append(rule)
            continue
        sources = (rule.source,) if isinstance(rule, One) else rule.sources
        codes, scale, minimum = zip(*(_read(file, source) for source in sources), strict=True)
        minima = torch.cat([m for m in minimum if m is not None]) if minimum[0] is not None else None
        packed[rule.ours].fill(torch.cat(codes), torch.cat(scale), minima)
        used |= {source.name for source in sources}
    return used, left


def _read(file: GGUF, source: Source) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 [rows, columns], scales and minima float16 [rows, columns / 32]."""
    kind, raw = file.info(source.name).type, file.raw(source.name)
    if isinstance(source, Interleave):  # rows of a head lie pair by pair in the file, half by half with us
        raw = raw.view(source.heads, -1, 2, raw.shape[1]).transpose(1, 2).reshape(raw.shape)
    rows = raw.shape[0]
    blocks = raw.view(-1, BLOCK_TYPES_BY_NAME[kind].num_bytes)
    scale = half(blocks, 0).half().view(rows, -1)
    if kind == "Q8_0":
        return (blocks[:, 2:].view(torch.int8).to(torch.int16) + 128).to(torch.uint8).reshape(rows, -1), scale, None
    if kind == "Q4_0":
        return nibbles(blocks[:, 2:]).reshape(rows, -1), scale, None
    return nibbles(blocks[:, 4:]).reshape(rows, -1), scale, half(blocks, 2).half().view(rows, -1)
