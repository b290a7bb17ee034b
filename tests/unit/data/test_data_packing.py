"""Packed rows against a slow loop over documents, and the promise that every token comes exactly once an epoch."""

import dataclasses
import itertools

import numpy as np
import pytest
from data_helpers import store_of
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.assemble import IGNORED, Rows, assemble
from weft.data.best_fit import best_fit
from weft.data.store import Part, TokenStore
from weft.data.windows import EMPTY, cut
from weft.errors import UserError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def naive_pack(store: TokenStore, length: int, row: int, turn: int) -> list[tuple[int, int, int, int, bool]]:
    """(token, target, position, segment, scored) of one row, token by token; padding is left out."""
    ends = set(store.document_ends().tolist())
    total, out = store.num_tokens, []
    position, segment = 0, 0
    for column in range(min(length, total - row * length)):
        at = (row * length + column + turn) % total
        if column and at in ends | {0}:  # a document begins here
            position, segment = 0, segment + 1
        last = at + 1 in ends
        scored = not last and bool(store.trained_at(np.array([at + 1]))[0])
        target = int(store.tokens_at(np.array([at + 1]))[0]) if scored else IGNORED
        out.append((int(store.tokens_at(np.array([at]))[0]), target, position, segment, scored))
        position += 1
    return out


def columns(rows: Rows, row: int) -> list[tuple[int, int, int, int, bool]]:
    size = int(rows.lengths[row])
    fields = (rows.tokens, rows.targets, rows.positions, rows.segments, rows.loss_mask)
    return list(zip(*(field[row, :size].tolist() for field in fields), strict=True))


def fill(store: TokenStore, length: int, mode: str, turn: int = 0) -> Rows:
    windows = cut(store, length, mode)
    return assemble(windows, [windows.spans(row, turn) for row in range(windows.num_rows)])


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 19), st.integers(1, 3), st.booleans(), st.integers(0, 10_000))
def test_pack_equals_a_loop_over_tokens(lengths: list[int], length: int, parts: int, masked: bool, turn: int) -> None:
    store = store_of(lengths, parts, masked)
    rows = fill(store, length, "pack", turn % store.num_tokens)
    for row in range(len(rows.tokens)):
        assert columns(rows, row) == naive_pack(store, length, row, turn % store.num_tokens)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 19), st.integers(1, 3), st.integers(0, 10_000), st.sampled_from(["pack", "stream", "pad", "best_fit"]))
def test_every_token_comes_exactly_once(lengths: list[int], length: int, parts: int, turn: int, mode: str) -> None:
    store = store_of(lengths, parts)
    ends = store.document_ends()
    firsts, lasts = {1, *(ends[:-1] + 1).tolist()}, set(ends.tolist())
    everything = set(range(1, store.num_tokens + 1))
    if mode in ("pad", "best_fit") and max(lengths) < 2:
        with pytest.raises(UserError, match="nothing to predict"):
            cut(store, length, mode)
        return
    rows = fill(store, length, mode, turn % store.num_tokens)
    read = [int(t) for row, size in zip(rows.tokens, rows.lengths, strict=True) for t in row[:size]]
    scored = rows.targets[rows.loss_mask].tolist()
    assert sorted(read) == sorted(everything if mode in ("pack", "stream") else everything - lasts)
    assert sorted(scored) == sorted(everything if mode == "stream" else everything - firsts)
    following = rows.tokens[rows.loss_mask] % store.num_tokens + 1
    assert (rows.targets[rows.loss_mask] == following).all()
    assert (rows.targets[~rows.loss_mask] == IGNORED).all()


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 19), st.sampled_from(["pack", "best_fit"]), st.integers(0, 10_000))
def test_segments_and_positions_keep_documents_apart(lengths: list[int], length: int, mode: str, turn: int) -> None:
    store = store_of([2, *lengths])
    rows = fill(store, length, mode, turn % store.num_tokens)
    assert rows.segments is not None
    owner = np.searchsorted(store.document_ends(), rows.tokens - 1, "right")
    for row, size in enumerate(rows.lengths.tolist()):
        segment, position = rows.segments[row], rows.positions[row]
        starts = np.flatnonzero(position == 0)
        assert segment[0] == 0
        assert (np.flatnonzero(np.diff(segment)) + 1 == starts[1:]).all()  # a segment begins where a position is 0, and nowhere else
        assert (np.diff(segment) <= 1).all()
        assert (np.diff(position)[np.diff(segment) == 0] == 1).all()
        for number in range(segment[size - 1] + 1 if size else 0):
            assert len(set(owner[row, :size][segment[:size] == number].tolist())) == 1
        if 0 < size < length:
            assert segment[size] == segment[size - 1] + 1
            assert (segment[size:] == segment[size]).all()


def test_a_moved_boundary_is_noticed() -> None:
    store = store_of([7, 5, 9])
    ends = store.parts[0].ends.copy()
    ends[0] += 1
    moved = TokenStore([dataclasses.replace(store.parts[0], ends=ends)], store.marks)
    right, wrong = fill(store, 8, "pack"), fill(moved, 8, "pack")
    assert columns(right, 0) == naive_pack(store, 8, 0, 0)
    assert columns(wrong, 0) != naive_pack(store, 8, 0, 0)
    crossing = (wrong.tokens == 7) & wrong.loss_mask  # token 7 is the first document's last: it has nothing to predict
    assert crossing.any()
    assert not ((right.tokens == 7) & right.loss_mask).any()


def test_pad_puts_one_document_in_a_row() -> None:
    rows = fill(store_of([4, 1, 11]), 5, "pad")
    assert rows.segments is None
    assert rows.lengths.tolist() == [3, 5, 5]
    assert rows.tokens.tolist() == [[1, 2, 3, 0, 0], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]
    assert rows.targets.tolist() == [[2, 3, 4, IGNORED, IGNORED], [7, 8, 9, 10, 11], [12, 13, 14, 15, 16]]
    assert (rows.positions == np.arange(5)).all()  # a piece that goes on begins at 0 again


def test_stream_predicts_over_document_ends() -> None:
    rows = fill(store_of([3, 4]), 3, "stream")
    assert rows.segments is None
    assert rows.targets.tolist() == [[2, 3, 4], [5, 6, 7], [1, IGNORED, IGNORED]]
    assert rows.loss_mask.tolist() == [[True] * 3, [True] * 3, [True, False, False]]


def test_rows_longer_than_the_store_are_padded() -> None:
    for mode in ("pack", "stream", "pad", "best_fit"):
        rows = fill(store_of([3]), 64, mode)
        assert rows.tokens.shape == (1, 64)
        assert rows.loss_mask.sum() == (3 if mode == "stream" else 2)
    empty = assemble(cut(store_of([3]), 5), [EMPTY])
    assert not empty.loss_mask.any()
    assert empty.row_bytes.tolist() == [0]


def test_masked_targets_are_not_scored() -> None:
    bits = np.packbits([False, False, False, True, True, True, False, True, True])
    part = Part(np.arange(1, 10, dtype=np.uint16), np.array([6, 9]), np.array([9, 4]), np.array([3, 2]), bits)
    rows = fill(TokenStore([part], store_of([1]).marks), 9, "pack")
    assert rows.tokens[rows.loss_mask].tolist() == [3, 4, 5, 7, 8]
    assert rows.targets[rows.loss_mask].tolist() == [4, 5, 6, 8, 9]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 31), min_size=1, max_size=80))
def test_best_fit_equals_a_search_over_all_rows(lengths: list[int]) -> None:
    order, offsets = best_fit(np.array(lengths), 31)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[piece] for piece in order[a:b]) for a, b in itertools.pairwise(offsets)]
    assert max(sums) <= 31
    free: list[int] = []
    for size in sorted(lengths, reverse=True):  # the fullest row that has room, found by looking at every one
        fitting = [room for room in free if room >= size]
        room = min(fitting, default=31)
        if fitting:
            free.remove(room)
        free.append(room - size)
    assert sorted(sums) == sorted(31 - room for room in free)


def test_best_fit_wastes_less_than_one_row_a_document() -> None:
    lengths = np.random.default_rng(1).integers(1, 300, 500).tolist()
    store = store_of(lengths)
    packed, padded = cut(store, 256, "best_fit"), cut(store, 256, "pad")
    needed = sum(length - 1 for length in lengths) / 256
    assert packed.num_rows <= 1.05 * needed
    assert padded.num_rows > 1.5 * needed


def test_positions_beyond_two_billion(tmp_path) -> None:
    """A sparse file stands in for a corpus of 2.2 billion tokens: positions and document ends are 64-bit throughout."""
    count = (1 << 31) + 50_000_000
    path = tmp_path / "train-00000.bin"
    with open(path, "wb") as file:
        file.truncate(2 * count)
        file.seek(2 * (count - 3))
        file.write(np.array([7, 8, 9], dtype="<u2").tobytes())
    from weft.data.store import map_array

    ends = np.array([10, count - 2, count], dtype=np.int64)
    part = Part(map_array(path, "uint16", count), ends, ends, ends)
    windows = cut(TokenStore([part], store_of([1]).marks), 1000)
    rows = assemble(windows, [windows.spans(windows.num_rows - 1, 0)])
    size = int(rows.lengths[0])
    assert size == count - (windows.num_rows - 1) * 1000
    assert rows.tokens[0, size - 3 : size].tolist() == [7, 8, 9]
    assert rows.targets[0, size - 3 : size].tolist() == [IGNORED, 9, IGNORED]
    assert rows.positions[0, size - 2 : size].tolist() == [0, 1]


def test_unknown_packing_and_length() -> None:
    with pytest.raises(UserError, match="Did you mean 'best_fit'"):
        cut(store_of([3]), 4, "bestfit")
    with pytest.raises(UserError, match="at least 1"):
        cut(store_of([3]), 0)
