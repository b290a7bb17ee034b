"""GGUF files: metadata, and tensors dequantised on the way in.

Importing this module and reading a header never imports torch, so that a tokenizer or a size can be had at once; the methods that
make tensors import it when they are called.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UserError, unknown
from weft.weights.gguf_header import BLOCK_TYPES_BY_NAME, TensorInfo, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["GGUF", "TensorInfo", "read_gguf"]


@dataclass(frozen=True)
class GGUF:
    """An open GGUF file; nothing but the header is held in memory.

    metadata     key -> Python value; arrays are lists.
    value_types  key -> the exact type in the file, such as "uint32" or "array[string]".
    tensors      name -> TensorInfo, in the file's order.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    value_types: dict[str, str]
    tensors: dict[str, TensorInfo]

    def info(self, name: str) -> TensorInfo:
        """The record of a tensor; raises UserError where the file has none of that name."""
        if name not in self.tensors:
            raise unknown(f"tensor in {self.path.name}", name, self.tensors)
        return self.tensors[name]

    def read(self, name: str, dtype: "torch.dtype | None" = None) -> "Tensor":
        """The tensor in its torch shape, dequantised in float32 and rounded to `dtype` (default float32)."""
        import torch

        out = torch.empty(self.info(name).shape, dtype=dtype or torch.float32)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: "Tensor") -> None:
        """Dequantise into `out`, a tensor of the same shape with any strides, dtype and device.

        Needs a few MB beside `out`, however large the tensor. Raises UserError for a type Weft cannot decode.
        """
        import torch

        from weft.weights import gguf_blocks, pieces

        info = self.info(name)
        assert tuple(out.shape) == info.shape, f"{name} is {info.shape}, not {tuple(out.shape)}"
        if info.type not in gguf_blocks.DECODERS:
            raise UserError(
                f"{self.path}: the tensor '{name}' is stored as {info.type}, which Weft does not read. "
                f"Give a file in one of {', '.join(gguf_blocks.DECODERS)}."
            )
        decode, block_type = gguf_blocks.DECODERS[info.type], BLOCK_TYPES_BY_NAME[info.type]
        elements, num_bytes = block_type.elements, block_type.num_bytes
        buffer = torch.empty(0, dtype=torch.uint8)
        with pieces.open_binary(self.path) as file:

            def read(start: int, count: int) -> "Tensor":
                nonlocal buffer
                size = count // elements * num_bytes
                if buffer.numel() < size:
                    buffer = torch.empty(size, dtype=torch.uint8)
                blocks = buffer[:size]
                pieces.read_bytes_into(file, info.offset + start // elements * num_bytes, blocks)
                return decode(blocks.view(-1, num_bytes)).view(-1)

            pieces.fill(out, read)

    def raw(self, name: str) -> "Tensor":
        """The stored bytes, uint8 [*shape[:-1], bytes of a row]: blocks lie side by side along a row."""
        import torch

        from weft.weights import pieces

        info = self.info(name)
        block_type = BLOCK_TYPES_BY_NAME[info.type]
        out = torch.empty((*info.shape[:-1], info.shape[-1] // block_type.elements * block_type.num_bytes), dtype=torch.uint8)
        with pieces.open_binary(self.path) as file:
            pieces.read_bytes_into(file, info.offset, out)
        return out


def read_gguf(path: str | Path) -> GGUF:
    """Open a GGUF file (versions 2 and 3, little-endian) and check its header and that every tensor it names is there.

    Raises UserError, naming the file and what is wrong, where it is missing, not GGUF, damaged or cut short.
    """
    header = read_header(path)
    return GGUF(Path(path), header.version, header.metadata, header.value_types, header.tensors)
