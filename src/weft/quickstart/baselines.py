"""What a compressor without a neural network needs for the same held-out bytes, in bits a byte.

A model that gives the held-out text probability p codes it in -log2 p bits (Shannon 1948), so that compressors and models stand on one
scale. All of them read the held-out files as one string; none has seen it before.
"""

import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np

XZ_PRESET = 9  # its window is 64 MiB: all of the training text stays in reach


def gzip_bits(text: bytes) -> float:
    """Bits a byte of `gzip -9`: LZ77 with a 32 KiB window and Huffman codes."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def xz_bits(text: bytes) -> float:
    """Bits a byte of `xz -9` alone: LZMA, which adapts to the text as it reads but starts from nothing."""
    return 8 * _xz_size(text) / len(text)


def xz_bits_given(training: bytes, text: bytes) -> float:
    """Bits a byte of `xz -9` that has read the training text: what the text adds to the size of the two compressed together."""
    with ThreadPoolExecutor(2) as pool:  # compression lets go of the interpreter's lock
        together, alone = pool.map(_xz_size, (training + text, training))
    return 8 * (together - alone) / len(text)


def _xz_size(text: bytes) -> int:
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=XZ_PRESET))


@dataclass(frozen=True)
class _Level:
    """Counts of one context length n, for table look-up.

    grams      sorted int64: context and next byte as one number of n + 1 bytes.      counts   [grams], how often each came.
    contexts   sorted int64: contexts of n bytes.                                     totals, kinds   [contexts]: bytes that followed, and
                                                                                      different ones among them.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray


class ByteNgram:
    """A byte n-gram model with interpolated Kneser-Ney smoothing (Kneser and Ney 1995; Chen and Goodman 1999, equation 4.27).

    P_n(b | c) = max(count(c b) - D, 0) / total(c) + D kinds(c) / total(c) * P_(n-1)(b | c without its first byte), down to the
    uniform 1/256. Below the highest order a count is the number of different bytes seen before the gram, and D comes from the grams
    that occurred once and twice. A context never seen defers wholly. For every context the 256 probabilities sum to one.
    """

    def __init__(self, training: bytes, order: int = 5) -> None:
        """`order` bytes a gram, 1 to 7 (a gram must fit an int64)."""
        assert 1 <= order <= 7
        self.order = order
        stream = np.frombuffer(training, np.uint8)
        grams, counts = np.unique(_windows(stream, order), return_counts=True)
        self.levels: list[_Level] = []
        for length in reversed(range(order)):
            self.levels.insert(0, _level(grams, counts))
            # One gram of the next lower order for each different byte before it, and the stream's own beginning, before which nothing is.
            shorter = np.concatenate([grams & ((1 << 8 * length) - 1), _windows(stream[:length], length)]) if length else grams[:0]
            grams, counts = np.unique(shorter, return_counts=True)
        self.discounts = [_discount(level.counts) for level in self.levels]

    def probabilities(self, text: bytes) -> np.ndarray:
        """P of each byte of `text` given the `order - 1` before it, float64 [len(text)]; the first ones have what there is."""
        stream = np.frombuffer(text, np.uint8)
        result = np.full(len(stream), 1 / 256)
        for length in range(self.order):
            if len(stream) > length:
                grams = _windows(stream, length + 1)
                result[length:] = self._refine(length, grams, result[length:])
        return result

    def distribution(self, context: bytes) -> np.ndarray:
        """P of each of the 256 bytes after `context`, float64 [256]."""
        result = np.full(256, 1 / 256)
        for length in range(min(self.order, len(context) + 1)):
            prefix = int.from_bytes(context[len(context) - length :], "big")
            result = self._refine(length, (prefix << 8) + np.arange(256, dtype=np.int64), result)
        return result

    def bits(self, text: bytes) -> float:
        """Bits a byte of `text`."""
        return float(-np.log2(self.probabilities(text)).mean())

    def _refine(self, length: int, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P with contexts of `length` bytes from P with one byte less."""
        level, discount = self.levels[length], self.discounts[length]
        count = _look_up(level.grams, level.counts, grams)
        total = _look_up(level.contexts, level.totals, grams >> 8)
        kinds = _look_up(level.contexts, level.kinds, grams >> 8)
        seen = total > 0
        known = np.maximum(count - discount, 0.0) + discount * kinds * lower
        return np.where(seen, known / np.where(seen, total, 1), lower)


def _windows(stream: np.ndarray, size: int) -> np.ndarray:
    """Every run of `size` bytes as one big-endian int64, in order of their ends."""
    count = max(0, len(stream) - size + 1)
    result = np.zeros(count, np.int64)
    for offset in range(size):
        result = (result << 8) | stream[offset : offset + count]
    return result


def _level(grams: np.ndarray, counts: np.ndarray) -> _Level:
    contexts, first = np.unique(grams >> 8, return_index=True)
    totals = np.add.reduceat(counts, first) if len(counts) else counts
    return _Level(grams, counts, contexts, totals, np.diff(np.append(first, len(grams))))


def _discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2), the share of a count to give away (Ney, Essen and Kneser 1994); a half where neither occurred."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] equals what is wanted, 0 where no key does."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return cast(np.ndarray, np.where(keys[place] == wanted, values[place], 0))
