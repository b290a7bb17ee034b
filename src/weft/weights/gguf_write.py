"""Writing GGUF version 3: one tensor in memory at a time, and the file in place only when it is whole."""

import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from weft.errors import UserError, unknown
from weft.weights.gguf_blocks import quantize_q8_0
from weft.weights.gguf_header import ARRAY, BLOCK_TYPES, DEFAULT_ALIGNMENT, MAX_DIMS, SCALARS, STRING
from weft.weights.pieces import PIECE

WRITABLE = ("F32", "F16", "BF16", "Q8_0")
_TYPE_NUMBERS = {block_type.name: (number, block_type) for number, block_type in BLOCK_TYPES.items()}
_VALUE_NUMBERS = {name: (number, letter) for number, (name, letter) in SCALARS.items()}


@dataclass(frozen=True)
class TypedValue:
    """A metadata value with its exact type: "uint32", "float64", "string", "array[int8]", ... where the default would be wrong."""

    type: str
    value: Any


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of the file to come: `load` is called once, when its turn comes, and returns a tensor of `shape`.

    type  "F32", "F16", "BF16" or "Q8_0"; Q8_0 needs a last axis that 32 divides.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    load: Callable[[], Tensor]


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Sequence[int], str, Callable[[], Tensor]]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a GGUF file atomically.

    path      replaced in one step at the end; after an exception whatever was there is untouched.
    metadata  key -> str, bool, int, float, a list of one of these, or TypedValue. An int becomes uint32 (int32 where negative, 64 bits
              where it must), a float float32; lists of ints become int32. `general.alignment` is honoured.
    tensors   (name, shape in torch's order, type, load): `load()` is called once, in order, so that one tensor is in memory at a time.
    progress  called with (bytes written, bytes in all) after each piece of tensor data.

    Raises UserError for a type that cannot be written, a row that does not fit the type's blocks, and a value beyond the type's range.
    """
    plan = [TensorToWrite(name, tuple(shape), kind, load) for name, shape, kind, load in tensors]
    values = {key: _typed(key, value) for key, value in metadata.items()}
    alignment = values["general.alignment"].value if "general.alignment" in values else DEFAULT_ALIGNMENT
    header, offsets, total = _header(values, plan, alignment)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            for item, offset in zip(plan, offsets, strict=True):
                file.write(b"\0" * (len(header) + offset - file.tell()))
                for _ in _write_tensor(file, item):
                    if progress:
                        progress(file.tell() - len(header), total)
            file.write(b"\0" * (len(header) + total - file.tell()))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _header(values: Mapping[str, TypedValue], plan: Sequence[TensorToWrite], alignment: int) -> tuple[bytes, list[int], int]:
    """The bytes before the first tensor, each tensor's offset from there, and the bytes of all tensors with their padding."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(plan), len(values))]
    for key, value in values.items():
        parts += [_string(key), _encode_value(key, value)]
    offsets, at = [], 0
    names: set[str] = set()
    for item in plan:
        if item.name in names:
            raise UserError(f"the tensor '{item.name}' is to be written twice; give each name once.")
        names.add(item.name)
        parts.append(_record(item, at))
        offsets.append(at)
        at = _aligned(at + _num_bytes(item), alignment)
    header = b"".join(parts)
    return header + b"\0" * (_aligned(len(header), alignment) - len(header)), offsets, at


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _record(item: TensorToWrite, offset: int) -> bytes:
    if item.type not in WRITABLE:
        raise unknown("GGUF type to write", item.type, WRITABLE)
    if not 1 <= len(item.shape) <= MAX_DIMS:
        raise UserError(f"the tensor '{item.name}' has {len(item.shape)} axes; GGUF holds 1 to {MAX_DIMS}.")
    number, block_type = _TYPE_NUMBERS[item.type]
    if item.shape[-1] % block_type.elements:
        raise UserError(
            f"the rows of '{item.name}' have {item.shape[-1]} numbers; {item.type} wants multiples of {block_type.elements}: store F16."
        )
    axes = struct.pack(f"<I{len(item.shape)}Q", len(item.shape), *reversed(item.shape))
    return _string(item.name) + axes + struct.pack("<IQ", number, offset)


def _num_bytes(item: TensorToWrite) -> int:
    block_type = _TYPE_NUMBERS[item.type][1]
    numbers = 1
    for axis in item.shape:
        numbers *= axis
    return numbers // block_type.elements * block_type.num_bytes


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: Any) -> TypedValue:
    """Give a plain Python value the type that readers of GGUF expect of it."""
    if isinstance(value, TypedValue):
        return value
    if isinstance(value, str):
        return TypedValue("string", value)
    if isinstance(value, bool):
        return TypedValue("bool", value)
    if isinstance(value, int):
        kinds = (("uint32", 0, 2**32), ("int32", -(2**31), 0), ("uint64", 0, 2**64), ("int64", -(2**63), 0))
        for kind, low, high in kinds:
            if low <= value < high:
                return TypedValue(kind, value)
    if isinstance(value, float):
        return TypedValue("float32", value)
    if isinstance(value, list | tuple) and value:
        return TypedValue(f"array[{_common_type(key, value)}]", value)
    raise UserError(f"the metadata value '{key}' is {value!r}; GGUF holds text, true/false, numbers and non-empty lists of one of these.")


def _common_type(key: str, items: Sequence[Any]) -> str:
    kinds = {"int" if kind.endswith(("int32", "int64")) else kind for kind in (_typed(key, item).type for item in items)}
    if kinds == {"int"}:
        return "int32" if all(-(2**31) <= item < 2**31 for item in items) else "int64"
    if len(kinds) == 1:
        return kinds.pop()
    raise UserError(f"the metadata list '{key}' mixes {', '.join(sorted(kinds))}; a list in GGUF holds one type.")


def _encode_value(key: str, typed: TypedValue) -> bytes:
    number, content = _encode(key, typed.type, typed.value)
    return struct.pack("<I", number) + content


def _encode(key: str, kind: str, value: Any) -> tuple[int, bytes]:
    """Type number and bytes of a value of the named type."""
    if kind == "string":
        return STRING, _string(value)
    if kind.startswith("array[") and kind.endswith("]"):
        element = kind[len("array[") : -1]
        if element in _VALUE_NUMBERS:
            number, letter = _VALUE_NUMBERS[element]
            return ARRAY, struct.pack("<IQ", number, len(value)) + _pack(key, element, f"{len(value)}{letter}", value)
        encoded = [_encode(key, element, item) for item in value]
        number = encoded[0][0] if encoded else STRING if element == "string" else ARRAY
        return ARRAY, struct.pack("<IQ", number, len(value)) + b"".join(content for _, content in encoded)
    if kind not in _VALUE_NUMBERS:
        raise unknown("GGUF metadata type", kind, [*_VALUE_NUMBERS, "string", "array[...]"])
    number, letter = _VALUE_NUMBERS[kind]
    return number, _pack(key, kind, letter, [value])


def _pack(key: str, kind: str, layout: str, items: Sequence[Any]) -> bytes:
    try:
        return struct.pack("<" + layout, *items)
    except (struct.error, OverflowError) as error:
        raise UserError(f"the metadata value '{key}' does not fit {kind}: {error}.") from None


@torch.no_grad()
def _write_tensor(file: BinaryIO, item: TensorToWrite) -> Iterator[None]:
    """Write a tensor's bytes, stopping after each piece so that progress can be told."""
    tensor = item.load()
    assert tuple(tensor.shape) == item.shape, f"{item.name} is {tuple(tensor.shape)}, not {item.shape}"
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        values = flat[start : start + PIECE].to("cpu", torch.float32)
        data = _encode_piece(item, values)
        file.write(data.view(torch.uint8).numpy().data)
        yield


def _encode_piece(item: TensorToWrite, values: Tensor) -> Tensor:
    """One piece in its storage type, uint8 or a float dtype, contiguous."""
    if item.type == "F32":
        return values
    if item.type == "BF16":
        return values.bfloat16()
    if item.type == "F16":
        data = values.half()
        if bool((data.isinf() & values.isfinite()).any()):
            raise UserError(f"'{item.name}' holds {values.abs().max():.3g}, beyond F16's 65504; write BF16 or F32.")
        return data
    blocks = quantize_q8_0(values.view(-1, 32))
    if not bool(blocks[:, :2].contiguous().view(torch.float16).isfinite().all()):
        raise UserError(f"'{item.name}' holds numbers that are not finite or beyond Q8_0's range; check the model, or write BF16 or F32.")
    return blocks.view(-1)
