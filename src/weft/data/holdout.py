"""Which documents are held out for validation."""

import hashlib
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from weft.data.documents import Document
from weft.data.shards import Split
from weft.errors import UserError, unknown

Method = Literal["auto", "hash", "tail"]
METHODS = ("auto", "hash", "tail")
ENOUGH = 10  # documents that choosing by hash should hold out, so that its luck hardly matters
ENOUGH_BYTES = 256  # text at the end of a document, on average, that is worth holding out


@dataclass
class Census:
    """What one pass over a corpus found.

    documents   that have text.               sizes   UTF-8 bytes of each.
    text_bytes  of all of them.               chosen  how many a hash would hold out.
    pairs       have a prompt.                empty   documents without text, which are left out.
    """

    documents: int = 0
    text_bytes: int = 0
    chosen: int = 0
    pairs: int = 0
    empty: int = 0
    sizes: "array[int]" = field(default_factory=lambda: array("q"))

    def count(self, document: Document, share: float) -> None:
        length = size(document)
        self.text_bytes += length
        if document.continues:
            self.sizes[-1] += length
        elif length:
            self.documents += 1
            self.sizes.append(length)
            self.chosen += is_chosen(document, share)
            self.pairs += document.prompt is not None
        else:
            self.empty += 1


class Holdout:
    """Divides the documents of one corpus, in order, into `train` and `valid`.

    share    of the documents to hold out, at least 0 and below 1; 0 holds out none.
    method   "hash" takes documents whose text hashes below the share, so that copies of a text stay on one side and a document
             keeps its side when others are added. "tail" takes the last documents; where the share is less than one document and
             documents are long, it takes the end of each, cut at a line. "auto" is "hash" where that holds out `ENOUGH` documents,
             else "tail".
    Raises UserError where nothing would be left to train on or to hold out.
    """

    def __init__(self, census: Census, share: float, method: Method = "auto") -> None:
        check(share, method)
        self.share = share
        many = share * census.documents >= ENOUGH
        self.method: Literal["hash", "tail"] = "hash" if method == "hash" or (method == "auto" and many) else "tail"
        if self.method == "hash" and share and not 0 < census.chosen < census.documents:
            side = "held out" if not census.chosen else "left to train on"
            raise UserError(
                f"of {census.documents} documents none is {side} when {share:g} of them are chosen by hash; change the share, or use tail."
            )
        held = round(share * census.documents)
        long = share * census.text_bytes >= ENOUGH_BYTES * census.documents
        self._whole = census.documents > 1 and (held > 0 or census.pairs > 0 or not long)
        self._first_held = census.documents - max(1, held)
        self._sizes = census.sizes
        self._index, self._start = -1, 0  # of the present document, and of the present piece within it
        self._side: Split = "train"

    def divide(self, document: Document) -> Iterator[tuple[Split, Document]]:
        """Yield the document with its split, or its two parts where the end of its text is held out."""
        if not document.continues:
            self._index, self._start, self._side = self._index + 1, 0, "train"
            if not self.share:
                pass
            elif self.method == "hash":
                self._side = "valid" if is_chosen(document, self.share) else "train"
            elif self._whole:
                self._side = "valid" if self._index >= self._first_held else "train"
        start, self._start = self._start, self._start + size(document)
        cuts = self.share and self.method == "tail" and not self._whole and self._side == "train"
        near = self._sizes[self._index] - math.ceil(self.share * self._sizes[self._index]) - start if cuts else 0
        if not cuts or near >= size(document):
            yield self._side, document
            return
        self._side = "valid"
        data = document.text.encode("utf-8")
        at = _line_end(data, near)
        if at:
            yield "train", replace(document, text=data[:at].decode("utf-8"))
        yield "valid", replace(document, text=data[at:].decode("utf-8"), continues=False)


def check(share: float, method: str) -> None:
    """Raise UserError for a share or a method that does not exist."""
    if not 0 <= share < 1:
        raise UserError(f"the held-out share is {share}; it must be at least 0 and below 1, such as 0.01.")
    if method not in METHODS:
        raise unknown("way to hold documents out", method, METHODS)


def size(document: Document) -> int:
    """UTF-8 bytes of the text that is trained on."""
    return len(document.text.encode("utf-8"))


def is_chosen(document: Document, share: float) -> bool:
    """Whether the hash of a document's beginning falls into the lowest `share` of all hashes."""
    text = document.text if document.prompt is None else f"{document.prompt}\0{document.text}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") < share * 2**64


def _line_end(data: bytes, near: int) -> int:
    """The first line end after byte `near`, else the last one before it, else the beginning of the character at `near`."""
    if near <= 0:
        return 0
    after = data.find(b"\n", near) + 1
    if 0 < after < len(data):
        return after
    before = data.rfind(b"\n", 0, near) + 1
    if before:
        return before
    while data[near] & 0xC0 == 0x80:
        near -= 1
    return near
