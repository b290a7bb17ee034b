"""Bin packing of document pieces into rows."""

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces into as few rows as best-fit decreasing finds (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").

    lengths   [n] int64, each 1 … capacity.
    Returns (order [n], offsets [rows + 1]): row r holds the pieces order[offsets[r] : offsets[r + 1]]. The longest piece goes first,
    into the fullest row with room for it (among equals the one filled last), so the plan depends on the lengths alone.

    A whole number serves as the set of the free capacities that some row has, one bit each, so the fullest row that fits is found by
    its lowest bit: about 2 microseconds a piece.
    """
    rows_free: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by what is free in them, used as stacks
    available = 0
    num_rows = 0
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    for piece, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = available >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = rows_free[free].pop()
            if not rows_free[free]:
                available ^= 1 << free
        else:
            free, row, num_rows = capacity, num_rows, num_rows + 1
        row_of[piece] = row
        left = free - size
        if left:
            rows_free[left].append(row)
            available |= 1 << left
    by_row = np.argsort(row_of, kind="stable")
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=num_rows))))
    return by_row, offsets
