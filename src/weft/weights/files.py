"""The tensors of a model folder in Hugging Face layout: safetensors, whole or sharded, read and written as streams.

`TensorFiles` knows names, shapes and dtypes from the headers alone and reads one tensor at a time with plain file reads, so that
filling an existing model needs little memory beyond the model. Torch's own pickled files are read through its weights-only loader.
"""

import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import UserError, unknown
from weft.files import atomic_write
from weft.weights import pieces
from weft.weights.layout import INDEX, PICKLED_SUFFIXES, SINGLE, find_weights
from weft.weights.safetensors_header import DTYPE_BYTES, StoredTensor, read_safetensors_header

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32,
    "F32": torch.float32, "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
assert _DTYPES.keys() == DTYPE_BYTES.keys()


class TensorFiles:
    """The tensors stored in a model folder, or in one .safetensors, .bin or .pt file, by name.

    A folder is read from `model.safetensors`, else through `model.safetensors.index.json`, else from `pytorch_model.bin` in the same
    two ways. Every header is checked when the object is made: UserError where a file is missing, damaged, cut short or outside the
    folder, or lacks a tensor that the index promises.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        self._loaded: dict[str, Tensor] = {}
        for file, promised in find_weights(self.path).items():
            if file.suffix in PICKLED_SUFFIXES:
                found: Mapping[str, Any] = _load_pickled(file)
                self._loaded.update(found)
            else:
                found = read_safetensors_header(file)[0]
                self._stored.update({name: (file, tensor) for name, tensor in found.items() if promised is None or name in promised})
            absent = sorted((promised or set()) - found.keys())
            if absent:
                raise UserError(f"{self.path}: '{absent[0]}' is not in {file.name}, where the index puts it. Fetch the model again.")

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order in which reading is quickest."""
        return [*self._stored, *self._loaded]

    def __contains__(self, name: str) -> bool:
        return name in self._stored or name in self._loaded

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; raises UserError where there is none of that name."""
        return tuple(self._loaded[name].shape) if name in self._loaded else self._find(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in; raises UserError where there is none of that name."""
        return self._loaded[name].dtype if name in self._loaded else _DTYPES[self._find(name)[1].dtype]

    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.num_bytes for _, tensor in self._stored.values()) + sum(t.nbytes for t in self._loaded.values())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its own memory on the CPU, in `dtype` (default: as stored)."""
        out = torch.empty(self.shape(name), dtype=dtype or self.dtype(name))
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy a tensor into `out`, of the same shape with any strides (so `weight.t()` will do), dtype and device.

        Needs a few MB beside `out`, however large the tensor.
        """
        assert tuple(out.shape) == self.shape(name), f"{name} is {self.shape(name)}, not {tuple(out.shape)}"
        if name in self._loaded:
            with torch.no_grad():
                out.copy_(self._loaded[name])
            return
        path, stored = self._find(name)
        dtype = _DTYPES[stored.dtype]
        with pieces.open_binary(path) as file:
            if out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu":
                pieces.read_bytes_into(file, stored.offset, out)
                return
            buffer = torch.empty(0, dtype=dtype)

            def read(start: int, count: int) -> Tensor:
                nonlocal buffer
                if buffer.numel() < count:
                    buffer = torch.empty(count, dtype=dtype)
                pieces.read_bytes_into(file, stored.offset + start * dtype.itemsize, buffer[:count])
                return buffer[:count]

            pieces.fill(out, read)

    def _find(self, name: str) -> tuple[Path, StoredTensor]:
        if name not in self._stored:
            raise unknown(f"tensor in {self.path}", name, self.names)
        return self._stored[name]


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """A state dict through torch's weights-only loader, which runs no code out of the file."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors, or is damaged: torch's weights-only loader refuses it. Give a safetensors file instead."
        ) from None
    except Exception:  # a damaged pickle can fail in any way at all
        raise UserError(f"{path} is cut short or damaged: torch cannot read it. Fetch the file again.") from None
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise UserError(f"{path} is not a plain table of tensors by name; give a safetensors file instead.")
    return data


def write_safetensors(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as shards with an index where they exceed `max_shard_bytes`.

    tensors   (name, tensor) in the order to be stored; held by reference until their shard is written, never copied whole but for a
              tensor that is not contiguous or not on the CPU, one at a time. A tensor above the limit gets a shard to itself.
    metadata  free-form strings in each file's header; default {"format": "pt"}, which transformers asks for.
    dtype     what floating-point tensors are rounded to as they are written; None keeps each one's own.

    Returns the files written, the index last. Each file is replaced atomically and files of an earlier save that would be read instead
    are removed at the end; to replace a whole folder in one step, write inside `weft.files.atomic_folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    parts: list[tuple[str, list[str]]] = []
    total = 0
    try:
        for shard in _shards(tensors, max_shard_bytes, dtype):
            total += sum(_stored_bytes(tensor, dtype) for tensor in shard.values())
            parts.append((_write_part(folder, shard, metadata, dtype), list(shard)))
        names = [SINGLE] if len(parts) == 1 else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
        for (temporary, _), name in zip(parts, names, strict=True):
            os.replace(temporary, folder / name)
    except BaseException:
        for temporary, _ in parts:
            Path(temporary).unlink(missing_ok=True)
        raise
    written = [folder / name for name in names]
    if len(parts) > 1:
        weight_map = {tensor: name for (_, held), name in zip(parts, names, strict=True) for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        atomic_write(folder / INDEX, json.dumps(index, indent=2) + "\n")
        written.append(folder / INDEX)
    for stale in [folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
        if stale not in written:
            stale.unlink(missing_ok=True)
    return written


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: float, dtype: torch.dtype | None) -> Iterable[dict[str, Tensor]]:
    """Group tensors, in order, so that no group exceeds `max_bytes` unless it is a single tensor. At least one group comes out."""
    shard: dict[str, Tensor] = {}
    names: set[str] = set()
    size = 0
    for name, tensor in tensors:
        if name in names:
            raise UserError(f"the tensor '{name}' is to be written twice; give each name once.")
        names.add(name)
        num_bytes = _stored_bytes(tensor, dtype)
        if shard and size + num_bytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += num_bytes
    yield shard


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _stored_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * _stored_dtype(tensor, dtype).itemsize


@torch.no_grad()
def _write_part(folder: Path, shard: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None) -> str:
    """Write one safetensors file under a temporary name and return that name."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in shard.items():
        stored = _stored_dtype(tensor, dtype)
        if stored not in _DTYPE_NAMES:
            raise UserError(f"the tensor '{name}' has dtype {stored}, which safetensors does not hold; convert it first.")
        end = at + _stored_bytes(tensor, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[stored], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".model.safetensors.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for tensor in shard.values():
                flat = tensor.detach().contiguous().view(-1)
                for start in range(0, flat.numel(), pieces.PIECE):
                    piece = flat[start : start + pieces.PIECE].to("cpu", _stored_dtype(tensor, dtype))
                    file.write(piece.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary
