"""A document, and the bytes of a file as text with an error that names the place."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from weft.errors import UserError


@dataclass(frozen=True)
class Document:
    """One document, or a piece of one too large to hold.

    text       what a model learns to write; UTF-8 encodable.
    origin     "file:row" of its first line or record, for messages.
    prompt     text before it that a model reads but is not trained on, or None.
    continues  True where the text carries on the document before.
    """

    text: str
    origin: str
    prompt: str | None = None
    continues: bool = False


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading bytes, through gzip where its name ends in .gz; raises UserError where it cannot be read."""
    try:
        if path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None


def decode(data: bytes, path: Path, row: int) -> str:
    """UTF-8 bytes that begin at the start of line `row` as text; raises UserError naming the row and column that are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = row + before.count(b"\n"), error.start - (before.rfind(b"\n") + 1) + 1
        guess = " It looks like UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`." if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise UserError(
            f"{path}:{line}: the byte 0x{data[error.start]:02x} at column {column} is not UTF-8; convert the file to UTF-8.{guess}"
        ) from None
