"""The front of a safetensors file: names, dtypes, shapes and places of its tensors. Importable without torch.

Layout: the header's length (8 bytes, little-endian), the header in JSON, then the tensors' bytes without a gap. The length of the file
therefore follows from the header, and a file cut short anywhere is noticed before any tensor is read.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import UserError

# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 64

# Bytes of one number, for every dtype that is a whole number of bytes.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: dtype as the file writes it ("BF16"), `offset` of its first byte from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_safetensors_header(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, in the order of their bytes, and its free-form metadata.

    Raises UserError, naming the file and what is wrong, where it is missing, not safetensors, damaged or cut short.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header claims {length} bytes and the file has {size}")
            header = file.read(length)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give the path of a safetensors file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        data = json.loads(header)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(data, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = data.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata is not a JSON object")
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in data.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)))
    end = 8 + length
    for name, tensor in tensors.items():
        if tensor.offset != end:
            raise _damaged(path, f"the tensor '{name}' does not begin where the one before it ends")
        end += tensor.num_bytes
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end} and the file at byte {size}")
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"the entry of the tensor '{name}' is malformed") from None
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) > MAX_AXES:
        raise _damaged(path, f"the entry of the tensor '{name}' is malformed")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UserError(f"{path}: the tensor '{name}' has dtype {dtype!r}, which Weft does not read. Allowed: {', '.join(DTYPE_BYTES)}.")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _damaged(path, f"the tensor '{name}' of shape {shape} does not have the {end - begin} bytes it claims")
    return StoredTensor(dtype, tuple(shape), start + begin, end - begin)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is cut short or damaged: {what}. Fetch or save the file again.")
