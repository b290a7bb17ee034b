"""Text files as documents: whole, or split at a separator line, in pieces small enough to hold."""

from collections.abc import Iterator
from pathlib import Path

from weft.data.documents import Document, decode, open_binary
from weft.errors import UserError

PIECE_BYTES = 1 << 18  # a larger document is tokenised in pieces of about this size, so that memory stays bounded
_SPACES = b" \t\r\n\f\v"


def read_text_documents(path: Path, separator: str | None = None, piece_bytes: int = PIECE_BYTES) -> Iterator[Document]:
    """Yield the documents of a text file: the whole file, or what lies between lines equal to `separator`.

    A document over `piece_bytes` comes as several pieces, all but the first with `continues`. They are cut between a line that
    ends in ink and one that begins with it, where the pre-tokenizers in use cut anyway. Line breaks are kept as they are, but the
    one before a separator belongs to the separator. Raises UserError with file, row and column where the bytes are not UTF-8.
    """
    mark = None if separator is None else separator.encode("utf-8")
    piece, row, begun = bytearray(), 1, False  # `begun`: a piece of the present document has been yielded
    for number, line in _lines(path, piece_bytes):
        if mark is not None and line.rstrip(b"\r\n") == mark:
            yield from _finish(piece, path, row, begun, strip=True)
            piece, row, begun = bytearray(), number + 1, False
            continue
        if len(piece) + len(line) > piece_bytes and piece and (_is_seam(piece, line) or len(piece) > 2 * piece_bytes):
            cut = len(piece) - _partial_character(piece)
            yield Document(decode(bytes(piece[:cut]), path, row), f"{path}:{row}", continues=begun)
            row += piece[:cut].count(b"\n")
            piece, begun = piece[cut:], True
        piece += line
    yield from _finish(piece, path, row, begun, strip=mark is not None)


def _lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield (row, line) with line breaks kept; a line over `limit` bytes comes in parts. A byte-order mark is dropped."""
    row = 1
    with open_binary(path) as file:
        try:
            first = True
            while line := file.readline(limit):
                if first and line.startswith(b"\xef\xbb\xbf"):
                    line = line[3:]
                first = False
                if line:
                    yield row, line
                row += line.endswith(b"\n")
        except (OSError, EOFError) as error:
            raise UserError(f"{path}:{row}: reading stopped ({error}); the file may be cut short: fetch it again.") from None


def _finish(piece: bytearray, path: Path, row: int, begun: bool, strip: bool) -> Iterator[Document]:
    if strip:
        piece = piece.removesuffix(b"\n").removesuffix(b"\r")
    if piece or not (begun or strip):  # an empty file is yielded, so that whoever counts can say so
        yield Document(decode(bytes(piece), path, row), f"{path}:{row}", continues=begun)


def _is_seam(before: bytearray, after: bytes) -> bool:
    """Whether a text may be cut here without changing its tokens: ink, one line break, ink."""
    return len(before) > 1 and before[-1:] == b"\n" and before[-2] not in _SPACES and after[0] not in _SPACES


def _partial_character(data: bytearray) -> int:
    """Bytes at the end of `data` that are the beginning of a UTF-8 character (0 to 3)."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return 0
        if byte >= 0xC0:
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < size else 0
    return 0
