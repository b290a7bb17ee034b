"""The front of a GGUF file: its metadata and the table of its tensors. Importable without torch.

Layout (the GGUF specification, versions 2 and 3, little-endian): magic, version, the two counts, the metadata as typed
key-value pairs, one record a tensor, padding to `general.alignment`, then the tensors' bytes. Every length in a file is a claim:
it is checked against the bytes that are there before anything is allocated for it.
"""

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weft.errors import UserError

# Real headers reach about 20 MB (a vocabulary of 256k with its merges); Python objects take several times the bytes on disk.
MAX_HEADER_BYTES = 64 * 2**20
MAX_DIMS = 4
MAX_NESTING = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class BlockType:
    """A storage type of tensors: `elements` consecutive numbers of a row take `num_bytes` bytes."""

    name: str
    elements: int
    num_bytes: int


# Numbers as in ggml's `enum ggml_type`.
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}
BLOCK_TYPES_BY_NAME = {block_type.name: block_type for block_type in BLOCK_TYPES.values()}

# Metadata value types: number -> (name, struct letter). Strings and arrays have no fixed size.
SCALARS = {
    0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"), 4: ("uint32", "I"), 5: ("int32", "i"),
    6: ("float32", "f"), 7: ("bool", "?"), 10: ("uint64", "Q"), 11: ("int64", "q"), 12: ("float64", "d"),
}  # fmt: skip
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file.

    shape      in torch's order: the last axis is the contiguous one (GGUF itself writes the axes the other way round).
    type       storage type by name, such as "F16" or "Q4_K".
    offset     of the first byte, from the start of the file.
    num_bytes  on disk.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What stands before the tensors' bytes. `value_types` keeps the exact type of each metadata value, as "uint32" or "array[string]"."""

    version: int
    metadata: dict[str, Any]
    value_types: dict[str, str]
    tensors: dict[str, TensorInfo]


def read_header(path: str | Path) -> Header:
    """Parse and check the header; raises UserError where the file is missing, not GGUF, damaged or cut short."""
    path = Path(path)
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by the with below; only the opening may fail on the user's path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file {path}; give the path of a GGUF file.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the path of a .gguf file.") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied.") from None
    with file:
        return _Parser(path, file).header()


class _Parser:
    """A cursor over the file that reads ahead in pieces and never past the end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.buffer = bytearray()
        self.at = 0

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is damaged: {what}. Fetch the file again.")

    def need(self, count: int, what: str) -> int:
        """Make `count` more bytes available, step over them and return where they start."""
        start, end = self.at, self.at + count
        if end > self.limit:
            if end <= self.size:
                raise self.damaged(f"its header claims over {MAX_HEADER_BYTES // 2**20} MB ({what})")
            raise UserError(
                f"{self.path} is cut short or damaged: {what} needs {count} bytes at byte {start}, "
                f"and the file has {self.size}. Fetch the file again."
            )
        while len(self.buffer) < end:
            piece = self.file.read(max(end - len(self.buffer), 2**20))
            if not piece:
                raise UserError(f"{self.path} became shorter while it was read; try again.")
            self.buffer += piece
        self.at = end
        return start

    def number(self, letter: str, what: str) -> Any:
        layout = "<" + letter
        (value,) = struct.unpack_from(layout, self.buffer, self.need(struct.calcsize(layout), what))
        return value

    def count(self, least_bytes: int, what: str) -> int:
        """A 64-bit count of things that take at least `least_bytes` each: refused where the file cannot hold them."""
        number: int = self.number("Q", what)
        if number * least_bytes > self.limit - self.at:
            raise self.damaged(f"it claims {number} {what} in the {self.limit - self.at} bytes that remain")
        return number

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        start = self.need(length, what)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} at byte {start} is not UTF-8") from None

    def header(self) -> Header:
        if self.size == 0:
            raise UserError(f"{self.path} is empty; give a GGUF file with content.")
        start = self.need(min(4, self.size), "the magic")
        if bytes(self.buffer[start : start + 4]) != b"GGUF":
            raise UserError(f"{self.path} is not a GGUF file: it does not start with 'GGUF'. Give a .gguf file or a model folder.")
        version = self.number("I", "the version")
        if version not in (2, 3):
            if version & 0xFFFF == 0 and version:
                raise UserError(f"{self.path} is a big-endian GGUF file; Weft reads little-endian ones. Convert the model again.")
            raise UserError(f"{self.path} is GGUF version {version}; Weft reads versions 2 and 3. Convert the model again.")
        num_tensors = self.count(8 + 4 + 8 + 4 + 8, "tensors")
        num_values = self.count(8 + 4 + 1, "metadata values")
        metadata: dict[str, Any] = {}
        value_types: dict[str, str] = {}
        for _ in range(num_values):
            key = self.text("a metadata key")
            if key in metadata:
                raise self.damaged(f"the metadata key '{key}' appears twice")
            metadata[key], value_types[key] = self.value(self.number("I", f"the type of '{key}'"), key, 0)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        return Header(version, metadata, value_types, self.tensor_table(num_tensors, alignment))

    def value(self, kind: int, key: str, depth: int) -> tuple[Any, str]:
        """One metadata value of type number `kind`, and that type's name."""
        if kind == STRING:
            return self.text(f"the text of '{key}'"), "string"
        if kind == ARRAY:
            return self.array(key, depth)
        if kind not in SCALARS:
            raise self.damaged(f"the metadata value '{key}' has the unknown type {kind}")
        name, letter = SCALARS[kind]
        return self.number(letter, f"the value of '{key}'"), name

    def array(self, key: str, depth: int) -> tuple[list[Any], str]:
        if depth == MAX_NESTING:
            raise self.damaged(f"the metadata array '{key}' is nested over {MAX_NESTING} deep")
        kind = self.number("I", f"the element type of '{key}'")
        if kind == STRING:
            return self.texts(self.count(8, f"strings of '{key}'"), key), "array[string]"
        if kind == ARRAY:
            items = [self.array(key, depth + 1) for _ in range(self.count(12, f"arrays of '{key}'"))]
            return [item for item, _ in items], f"array[{items[0][1] if items else 'array'}]"
        if kind not in SCALARS:
            raise self.damaged(f"the metadata array '{key}' has the unknown element type {kind}")
        name, letter = SCALARS[kind]
        size = struct.calcsize("<" + letter)
        number = self.count(size, f"numbers of '{key}'")
        start = self.need(number * size, f"the array '{key}'")
        return list(struct.unpack_from(f"<{number}{letter}", self.buffer, start)), f"array[{name}]"

    def texts(self, number: int, key: str) -> list[str]:
        """`number` strings: the one loop that runs as often as a vocabulary is long, so it looks nothing up and calls little."""
        what = f"a string of '{key}'"
        length_at = struct.Struct("<Q").unpack_from
        texts: list[str] = []
        append: Callable[[str], None] = texts.append
        buffer, at, held = self.buffer, self.at, len(self.buffer)
        for _ in range(number):
            if at + 8 > held:
                self.at = at
                self.need(8, what)
                held = len(buffer)
            start = at + 8
            at = start + length_at(buffer, at)[0]
            if at > held:
                self.at = start
                self.need(at - start, what)
                held = len(buffer)
            try:
                append(buffer[start:at].decode())
            except UnicodeDecodeError:
                raise self.damaged(f"{what} at byte {start} is not UTF-8") from None
        self.at = at
        return texts

    def tensor_table(self, number: int, alignment: int) -> dict[str, TensorInfo]:
        records: list[tuple[str, tuple[int, ...], BlockType, int]] = []
        for _ in range(number):
            name = self.text("a tensor's name")
            dims = self.number("I", f"the number of axes of '{name}'")
            if not 1 <= dims <= MAX_DIMS:
                raise self.damaged(f"the tensor '{name}' has {dims} axes; 1 to {MAX_DIMS} are allowed")
            shape = tuple(self.number("Q", f"the shape of '{name}'") for _ in range(dims))[::-1]
            kind = self.number("I", f"the type of '{name}'")
            if kind not in BLOCK_TYPES:
                raise UserError(f"{self.path}: the tensor '{name}' has the unknown type {kind}. Give a Q8_0 or F16 file.")
            records.append((name, shape, BLOCK_TYPES[kind], self.number("Q", f"the offset of '{name}'")))
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, block_type, offset in records:
            if name in tensors:
                raise self.damaged(f"the tensor '{name}' appears twice")
            tensors[name] = self.tensor(name, shape, block_type, start + offset, alignment)
        return tensors

    def tensor(self, name: str, shape: tuple[int, ...], block_type: BlockType, offset: int, alignment: int) -> TensorInfo:
        if shape[-1] % block_type.elements:
            raise self.damaged(f"the rows of '{name}' have {shape[-1]} numbers; {block_type.name} wants multiples of {block_type.elements}")
        if offset % alignment:
            raise self.damaged(f"the tensor '{name}' is not aligned to {alignment} bytes")
        num_bytes = math.prod(shape) // block_type.elements * block_type.num_bytes
        if offset + num_bytes > self.size:
            raise UserError(
                f"{self.path} is cut short or damaged: the tensor '{name}' ends at byte {offset + num_bytes}, "
                f"and the file has {self.size}. Fetch the file again."
            )
        return TensorInfo(name, shape, block_type.name, offset, num_bytes)
