"""A stream of tokens cut into documents, read in place from memory maps or arrays."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.data.encoder import Marks
from weft.errors import UserError

Array = np.ndarray


@dataclass(frozen=True)
class Part:
    """One shard: N tokens and D documents.

    tokens       [N] uint16 or uint32.
    ends         [D] int64, strictly increasing: tokens up to and with each document's last; the last entry is N.
    text_bytes   [D] int64: UTF-8 bytes of each document's text that is trained on.
    text_tokens  [D] int64: tokens of that text; they stand directly before the end mark.
    mask         [ceil(N / 8)] uint8, highest bit first: 1 where a token is trained on; None trains on all.
    """

    tokens: Array
    ends: Array
    text_bytes: Array
    text_tokens: Array
    mask: Array | None = None


class TokenStore:
    """Documents one after another, addressed by a position from 0 to `num_tokens` that runs through all parts.

    token_bytes   [vocab] bytes of text of each id, or None where that is not known exactly; then a document's bytes are
                  spread evenly over its tokens, which is exact for whole documents.
    prefix_bytes  bytes by which `token_bytes` overstates a document's first token (SentencePiece's added space).
    digest        SHA-256 that tells this data from any other; None computes it when it is asked for.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        marks: Marks,
        token_bytes: Array | None = None,
        prefix_bytes: int = 0,
        name: str = "memory",
        tokenizer_sha256: str = "",
        digest: str | None = None,
    ) -> None:
        if not parts:
            raise UserError(f"{name} holds no documents; prepare it from a corpus that is not empty.")
        self.parts, self.marks, self.token_bytes, self.prefix_bytes = tuple(parts), marks, token_bytes, prefix_bytes
        self.name, self.tokenizer_sha256, self._digest = name, tokenizer_sha256, digest
        self.starts = np.cumsum([0] + [len(part.tokens) for part in parts], dtype=np.int64)
        self.first_documents = np.cumsum([0] + [len(part.ends) for part in parts], dtype=np.int64)
        self.num_tokens, self.num_documents = int(self.starts[-1]), int(self.first_documents[-1])
        self.masked = any(part.mask is not None for part in parts)

    @classmethod
    def from_lists(
        cls,
        documents: Sequence[Sequence[int]],
        marks: Marks | None = None,
        masks: Sequence[Sequence[bool]] | None = None,
        text_bytes: Sequence[int] | None = None,
        token_bytes: Array | None = None,
    ) -> "TokenStore":
        """A store of documents given as ids, marks included; `masks` are True where a token is trained on."""
        marks = marks or Marks()
        kept = [index for index, document in enumerate(documents) if len(document)]
        lengths = np.array([len(documents[index]) for index in kept], dtype=np.int64)
        tokens = np.array([token for document in documents for token in document], dtype=np.uint32)
        bits = None
        scored = lengths - (marks.bos is not None) - (marks.eos is not None)
        if masks is not None:
            flags = [np.asarray(masks[index], dtype=bool) for index in kept]
            bits = np.packbits(np.concatenate(flags)) if flags else None
            scored = np.array([int(flag.sum()) for flag in flags], dtype=np.int64) - (marks.eos is not None)
        sizes = scored if text_bytes is None else np.array([text_bytes[index] for index in kept], dtype=np.int64)
        parts = [Part(tokens, np.cumsum(lengths), sizes, scored, bits)] if kept else []
        return cls(parts, marks, token_bytes)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all text that is trained on."""
        return sum(int(part.text_bytes.sum()) for part in self.parts)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tokens, offsets and masks."""
        arrays = [a for part in self.parts for a in (part.tokens, part.ends, part.text_bytes, part.text_tokens, part.mask) if a is not None]
        return sum(array.nbytes for array in arrays)

    @property
    def digest(self) -> str:
        """SHA-256 of the content. Data on disk brings it along; data in memory is read once."""
        if self._digest is None:
            state = hashlib.sha256()
            for part in self.parts:
                for array in (part.tokens, part.ends, part.mask):
                    state.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
            self._digest = state.hexdigest()
        return self._digest

    def document_ends(self) -> Array:
        """[num_documents] int64: the end position of every document. Reads all offsets."""
        return np.concatenate([part.ends + start for part, start in zip(self.parts, self.starts, strict=False)])

    def ends_after(self, position: int, stop: int) -> Array:
        """The ends e of documents with position < e <= stop, ascending, int64: O(log documents)."""
        if len(self.parts) == 1:
            return _between(self.parts[0].ends, position, stop)
        first = int(np.searchsorted(self.starts, position, "right")) - 1
        found = []
        for part, start in zip(self.parts[first:], self.starts[first:], strict=False):
            if start >= stop:
                break
            found.append(_between(part.ends, position - int(start), stop - int(start)) + start)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def tokens_at(self, positions: Array) -> Array:
        """The ids at positions [n] int64, as int64."""
        if len(self.parts) == 1:
            return self.parts[0].tokens[positions].astype(np.int64)
        out = np.empty(len(positions), np.int64)
        for part, chosen, local in self._by_part(positions):
            out[chosen] = part.tokens[local]
        return out

    def trained_at(self, positions: Array) -> Array:
        """bool [n]: whether the token at each position is trained on."""
        out = np.ones(len(positions), bool)
        for part, chosen, local in self._by_part(positions):
            if part.mask is not None:
                out[chosen] = (part.mask[local >> 3] >> (7 - (local & 7)).astype(np.uint8)) & 1
        return out

    def bytes_at(self, positions: Array, ids: Array, opens: Array) -> Array:
        """UTF-8 bytes of text that the token at each position [n] stands for, int64 [n].

        ids     [n] the tokens themselves.
        opens   [n] bool, True for the first token of a document's text.
        """
        if self.token_bytes is not None:
            exact: Array = self.token_bytes[ids] - self.prefix_bytes * opens.astype(np.int64)
            return exact
        out = np.empty(len(positions), np.int64)
        for part, chosen, local in self._by_part(positions):
            document = np.searchsorted(part.ends, local, "right")
            count, size = part.text_tokens[document], part.text_bytes[document]
            stop = part.ends[document] - (self.marks.eos is not None)
            rank = local - (stop - count)  # tokens of the document's text before this one; a mark has no rank among them
            whole = np.maximum(count, 1)
            share = size * (rank + 1) // whole - size * rank // whole
            out[chosen] = np.where((rank >= 0) & (rank < count), share, 0)
        return out

    def document(self, index: int) -> tuple[int, int]:
        """The positions (start, stop) of one document."""
        part = int(np.searchsorted(self.first_documents, index, "right")) - 1
        local = index - int(self.first_documents[part])
        ends, offset = self.parts[part].ends, int(self.starts[part])
        return offset + (int(ends[local - 1]) if local else 0), offset + int(ends[local])

    def _by_part(self, positions: Array) -> list[tuple[Part, Array, Array]]:
        """For each part that is touched: the part, which of `positions` fall into it, and where in it they lie."""
        if len(self.parts) == 1:
            return [(self.parts[0], np.arange(len(positions)), positions)]
        owner = np.searchsorted(self.starts, positions, "right") - 1
        chosen = [(number, np.flatnonzero(owner == number)) for number in np.unique(owner)]
        return [(self.parts[number], where, positions[where] - self.starts[number]) for number, where in chosen]


def _between(ends: Array, position: int, stop: int) -> Array:
    """ends[i] with position < ends[i] <= stop."""
    low, high = np.searchsorted(ends, np.array([position, stop], dtype=np.int64), "right")
    return ends[low:high]


def map_array(path: Path, dtype: str, count: int) -> Array:
    """Map `count` little-endian numbers of a file that is known to hold them, read-only and without copying."""
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", shape=(count,)).view(np.ndarray)
