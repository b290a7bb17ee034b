"""A random order that can be entered anywhere: no table, no start-up, any index in constant time."""

import numpy as np

ROUNDS = 8
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64's finaliser over a running sum): the same everywhere, always."""
    state = 0
    for value in values:
        state = (state + (value & _WORD) + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * _MIX_1) & _WORD
        state = ((state ^ (state >> 27)) * _MIX_2) & _WORD
        state ^= state >> 31
    return state


class Permutation:
    """A pseudorandom bijection of 0 … size - 1 chosen by integer keys.

    A Feistel network (Luby and Rackoff 1988) over the next power of two, walked until it lands below `size` (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"): fewer than two walks on average. A shuffled index table would answer as fast, but
    needs 8 bytes a row and a second for ten million rows at the start of every epoch, and again at every resume.
    """

    def __init__(self, size: int, *keys: int) -> None:
        assert size > 0
        bits = max(2, (size - 1).bit_length())
        self.size, self._low_bits, self._high_bits = size, bits // 2, bits - bits // 2
        self._keys = [np.uint64(mix(*keys, number)) for number in range(ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where each of `indices` [n] int64 is sent, as int64 [n]."""
        out = self._once(indices.astype(np.uint64))
        while (outside := np.flatnonzero(out >= self.size)).size:
            out[outside] = self._once(out[outside])
        return out.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        """The Feistel network: the halves change places every round, so after an even number they have their widths again."""
        left_bits, right_bits = self._high_bits, self._low_bits
        left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
        for key in self._keys:
            scrambled = (right + key) * np.uint64(_MIX_1)
            scrambled = (scrambled ^ (scrambled >> np.uint64(29))) * np.uint64(_MIX_2)
            left, right = right, left ^ (scrambled >> np.uint64(64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


class RowOrder:
    """The order in which a source's rows are drawn: draw d is in epoch d // num_rows, and every epoch has an order of its own.

    A pure function of (keys, draw). The answers for the last `BLOCK` of consecutive draws are kept, because the network costs as much
    for a thousand indices as for one.
    """

    BLOCK = 2048

    def __init__(self, num_rows: int, shuffle: bool, *keys: int) -> None:
        self.num_rows, self._shuffle, self._keys = num_rows, shuffle, keys
        self._memo = (-1, np.empty(0, np.int64))  # replaced as one, so that threads may share it

    def rows(self, draws: np.ndarray) -> np.ndarray:
        """The row of each draw [n] int64, as int64 [n]."""
        if not self._shuffle:
            return draws % self.num_rows
        out = np.empty_like(draws)
        blocks = draws // self.BLOCK
        for block in np.unique(blocks):
            here = blocks == block
            out[here] = self._block_rows(int(block))[draws[here] - block * self.BLOCK]
        return out

    def _block_rows(self, block: int) -> np.ndarray:
        known, out = self._memo
        if known != block:
            draws = np.arange(block * self.BLOCK, (block + 1) * self.BLOCK, dtype=np.int64)
            epochs, out = draws // self.num_rows, draws % self.num_rows
            for epoch in np.unique(epochs):
                here = epochs == epoch
                out[here] = Permutation(self.num_rows, *self._keys, int(epoch))(out[here])
            self._memo = (block, out)
        return out
