"""A row of prepared data shown as text, document by document."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from weft.data.assemble import assemble
from weft.data.store import TokenStore
from weft.data.windows import cut


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


@dataclass(frozen=True)
class Passage:
    """A run of tokens of one document within a row.

    first, last   columns of the row.
    trained       whether the run's own tokens are trained on: a prompt and its completion are two runs.
    text          decoded, marks included; None without a tokenizer.
    """

    first: int
    last: int
    trained: bool
    ids: tuple[int, ...]
    text: str | None


def first_row(store: TokenStore, length: int, tokenizer: Decoder | None = None, mode: str = "pack") -> list[list[Passage]]:
    """The documents of the first row in stored order, each as its passages; padding is left out."""
    windows = cut(store, length, mode)
    spans = windows.spans(0, 0)
    rows = assemble(windows, [spans])
    shown = []
    column = 0
    for start, size in zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True):
        trained = store.trained_at(np.arange(start, start + size)).tolist()
        ids = rows.tokens[0, column : column + size].tolist()
        shown.append(_passages(ids, trained, column, tokenizer))
        column += size
    return shown


def _passages(ids: list[int], trained: list[bool], column: int, tokenizer: Decoder | None) -> list[Passage]:
    """Cut one document wherever its tokens begin or cease to be trained on."""
    passages = []
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or trained[stop] != trained[start]:
            run = tuple(ids[start:stop])
            text = None if tokenizer is None else tokenizer.decode(run, skip_special=False)
            passages.append(Passage(column + start, column + stop - 1, trained[start], run, text))
            start = stop
    return passages
