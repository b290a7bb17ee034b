"""Spans of a store as filled rows: one vectorised pass over a whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.data.windows import Spans, Windows

IGNORED = -100  # the target of a position that is not trained on: what torch's cross-entropy skips


@dataclass(frozen=True)
class Rows:
    """R rows of T positions, as arrays; the fields mean what they mean in `packing.PackedBatch`."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray | None
    loss_mask: np.ndarray
    lengths: np.ndarray
    row_bytes: np.ndarray


def assemble(windows: Windows, rows: Sequence[Spans]) -> Rows:
    """Fill one row from the spans of each entry of `rows`; what they leave over is padding, the row's last segment."""
    store, length, count = windows.store, windows.length, len(rows)
    filled = np.array([int(spans.lengths.sum()) for spans in rows], dtype=np.int64)
    padded = _with_padding(rows, filled, length)
    starts, lengths, closes = (np.concatenate(column) for column in zip(*padded, strict=True))
    begins = np.cumsum(lengths) - lengths  # where each span begins in the batch laid out flat
    columns = np.arange(length, dtype=np.int64)
    within = np.arange(count * length, dtype=np.int64) - np.repeat(begins, lengths)
    at = np.repeat(starts, lengths) + within  # position in the store of every token
    padding = (columns >= filled[:, None]).ravel()
    at[padding] = 0

    trained = ~padding
    trained[(begins + lengths - 1)[closes]] = False
    following = at + 1
    following[following == store.num_tokens] = 0  # a stretch may wrap around
    if store.masked:
        trained &= store.trained_at(following)
    scored = np.flatnonzero(trained)
    following = following[scored]
    tokens, answers = store.tokens_at(at), store.tokens_at(following)
    tokens[padding] = 0
    targets = np.full(count * length, IGNORED, np.int64)
    targets[scored] = answers
    text_bytes = store.bytes_at(following, answers, _opens(windows, following))
    row_bytes = np.bincount(scored // length, weights=text_bytes, minlength=count).astype(np.int64)

    shape = (count, length)
    positions = np.tile(columns, (count, 1)) if windows.single else within.reshape(shape)
    segments = None if windows.single else _numbers(padded, lengths).reshape(shape)
    return Rows(tokens.reshape(shape), targets.reshape(shape), positions, segments, trained.reshape(shape), filled, row_bytes)


def _numbers(padded: Sequence[tuple[np.ndarray, ...]], lengths: np.ndarray) -> np.ndarray:
    """The number of each token's span within its row, flat over the batch."""
    counts = np.array([len(starts) for starts, _, _ in padded], dtype=np.int64)
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(numbers, lengths)


def _with_padding(rows: Sequence[Spans], filled: np.ndarray, length: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Starts, lengths and closes of each row, with one more span where tokens are missing."""
    padded = []
    for spans, used in zip(rows, filled.tolist(), strict=True):
        if used < length:
            spans = Spans(np.append(spans.starts, 0), np.append(spans.lengths, length - used), np.append(spans.closes, False))
        padded.append((spans.starts, spans.lengths, spans.closes))
    return padded


def _opens(windows: Windows, targets_at: np.ndarray) -> np.ndarray:
    """Whether each target is the first of its document's text: whether the mark between documents stands before it."""
    store = windows.store
    mark = store.marks.eos if store.marks.bos is None else store.marks.bos
    if not store.prefix_bytes or mark is None:
        return np.zeros(len(targets_at), bool)
    opened: np.ndarray = store.tokens_at((targets_at - 1) % store.num_tokens) == mark
    return opened
