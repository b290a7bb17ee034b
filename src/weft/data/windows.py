"""How a store is cut into rows of at most T tokens: contiguous with restarts, best fit, one document a row, or one endless stream.

A row is a list of spans; a span is a run of tokens of one document that a model reads from position 0. A document longer than a row
goes on in another row, and there too begins at position 0: no state or context is carried between rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from weft.data.best_fit import best_fit
from weft.data.store import TokenStore
from weft.errors import UserError, unknown

Mode = Literal["pack", "best_fit", "pad", "stream"]


@dataclass(frozen=True)
class Spans:
    """The spans of one row.

    starts   [k] int64 positions in the store.
    lengths  [k] int64 tokens, each at least 1; their sum is at most T.
    closes   [k] bool: the span's last token is its document's last, so nothing of the document is left to predict.
    """

    starts: np.ndarray
    lengths: np.ndarray
    closes: np.ndarray


EMPTY = Spans(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))


class Windows(Protocol):
    """One way of cutting: `num_rows` rows of at most `length` tokens, which together hold an epoch.

    `bounded` is False where a row's tokens predict on over document ends. `single` is True where a row is one sequence, so that it
    needs no segments. `spans(row, turn)` is row `row` with the cuts moved by `turn` tokens, where the cut positions are free.
    """

    mode: Mode
    bounded: bool
    single: bool
    store: TokenStore
    length: int
    num_rows: int

    def spans(self, row: int, turn: int) -> Spans: ...


class Contiguous:
    """Rows are consecutive stretches of the store, every token in exactly one: `pack` restarts at each document, `stream` never does.

    The stretches begin at `turn` and wrap around, so that an epoch's documents can be cut in other places than the last epoch's.
    Every token but a document's first is predicted once an epoch (in `stream`, the first ones too).
    """

    def __init__(self, store: TokenStore, length: int, bounded: bool) -> None:
        self.mode: Mode = "pack" if bounded else "stream"
        self.store, self.length, self.bounded, self.single = store, length, bounded, not bounded
        self.num_rows = -(-store.num_tokens // length)

    def spans(self, row: int, turn: int) -> Spans:
        total = self.store.num_tokens
        first = row * self.length
        count = min(self.length, total - first)
        start = (first + turn) % total
        if start + count <= total:
            return self._stretch(start, start + count)
        head, tail = self._stretch(start, total), self._stretch(0, start + count - total)
        joined = (np.concatenate(pair) for pair in ((head.starts, tail.starts), (head.lengths, tail.lengths), (head.closes, tail.closes)))
        return Spans(*joined)

    def _stretch(self, start: int, stop: int) -> Spans:
        """The spans of positions start … stop - 1."""
        if not self.bounded:
            return Spans(np.array([start]), np.array([stop - start]), np.zeros(1, bool))
        ends = self.store.ends_after(start, stop)
        closes = np.ones(len(ends), bool)
        if not len(ends) or ends[-1] != stop:
            ends, closes = np.append(ends, stop), np.append(closes, False)
        starts = np.concatenate(([start], ends[:-1]))
        return Spans(starts, ends - starts, closes)


class Pieces:
    """Rows hold whole documents, cut only where one is longer than a row; `pad` puts one in a row, `best_fit` as many as fit.

    A document of n tokens has n - 1 to predict from, so its last one is never read; every other token is read exactly once an epoch. The
    plan is made once, from document lengths alone (8 bytes a document and a piece), and is the same in every epoch.
    """

    bounded = True

    def __init__(self, store: TokenStore, length: int, mode: Literal["pad", "best_fit"]) -> None:
        self.mode: Mode = mode
        self.store, self.length, self.single = store, length, mode == "pad"
        ends = store.document_ends()
        starts = np.concatenate(([0], ends[:-1]))
        inputs = ends - starts - 1
        counts = -(-inputs // length)
        self._starts = np.repeat(starts, counts) + length * _within(counts)
        self._lengths = np.minimum(length, np.repeat(ends - 1, counts) - self._starts)
        pieces = len(self._starts)
        if not pieces:
            raise UserError(f"no document of {store.name} has two tokens, so there is nothing to predict; give longer texts.")
        plan = (np.arange(pieces), np.arange(pieces + 1)) if self.single else best_fit(self._lengths, length)
        self._order: np.ndarray = plan[0]
        self._offsets: np.ndarray = plan[1]
        self.num_rows = len(self._offsets) - 1

    def spans(self, row: int, turn: int) -> Spans:
        chosen = self._order[self._offsets[row] : self._offsets[row + 1]]
        return Spans(self._starts[chosen], self._lengths[chosen], np.zeros(len(chosen), bool))


def _within(counts: np.ndarray) -> np.ndarray:
    """0 … c - 1 for each c of `counts`, one after another."""
    total = int(counts.sum())
    return np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)


MODES: dict[str, Callable[[TokenStore, int], Windows]] = {
    "pack": lambda store, length: Contiguous(store, length, bounded=True),
    "stream": lambda store, length: Contiguous(store, length, bounded=False),
    "best_fit": lambda store, length: Pieces(store, length, "best_fit"),
    "pad": lambda store, length: Pieces(store, length, "pad"),
}


def cut(store: TokenStore, length: int, mode: str = "pack") -> Windows:
    """Cut a store into rows of `length` tokens; raises UserError for an unknown mode or a length below 1."""
    if mode not in MODES:
        raise unknown("packing", mode, MODES)
    if length < 1:
        raise UserError(f"the row length is {length}; it must be at least 1 token.")
    return MODES[mode](store, length)
