"""The baselines are honest codes: their sizes are those of the real compressors, their probabilities sum to one."""

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from weft.quickstart import baselines
from weft.quickstart.baselines import ByteNgram, gzip_bits, xz_bits, xz_bits_given

TEXT = Path(baselines.__file__).read_bytes()
TRAINING, HELDOUT = TEXT[:-1501], TEXT[-1501:]


def test_gzip_and_xz_decompress_to_the_text_and_cost_their_size():
    assert gzip_bits(TEXT) * len(TEXT) / 8 == pytest.approx(len(gzip.compress(TEXT, 9, mtime=0)))
    assert xz_bits(TEXT) * len(TEXT) / 8 == pytest.approx(len(lzma.compress(TEXT, preset=9)))
    assert xz_bits(TEXT) < 8 * 0.6


@pytest.mark.skipif(shutil.which("xz") is None, reason="there is no xz program")
def test_xz_is_the_program_xz():
    size = len(subprocess.run(["xz", "-9", "-c"], input=TEXT, capture_output=True, check=True).stdout)
    assert xz_bits(TEXT) == 8 * size / len(TEXT)


def test_training_text_helps_xz_and_a_copy_costs_nearly_nothing():
    assert xz_bits_given(TRAINING, HELDOUT) < xz_bits(HELDOUT)
    assert xz_bits_given(TEXT, HELDOUT) < 0.4
    assert xz_bits_given(bytes(range(256)) * 10, HELDOUT) > 0.9 * xz_bits(HELDOUT) - 0.5


@pytest.mark.parametrize("order", [1, 2, 5, 7])
def test_ngram_probabilities_sum_to_one_in_every_context(order):
    model = ByteNgram(TRAINING, order)
    contexts = [b"", b"d", b"def ", b"    return", TRAINING[:3], TRAINING[-6:], b"\x00\xff\x00\xff\x00\xff", b"q\x80zz"]
    for context in contexts:
        distribution = model.distribution(context)
        assert distribution.min() > 0
        assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_ngram_probabilities_of_a_text_are_those_of_its_contexts_one_by_one():
    model = ByteNgram(TRAINING, 5)
    text = HELDOUT[:97] + b"\x00\x01never seen\xfe"
    together = model.probabilities(text)
    alone = [model.distribution(text[max(0, i - 4) : i])[byte] for i, byte in enumerate(text)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    assert not np.allclose(together, [model.distribution(text[max(0, i - 3) : i])[byte] for i, byte in enumerate(text)], rtol=1e-3)


def test_a_bigram_by_hand():
    # "abab": bigrams ab twice, ba once; unigram kinds: b after a; a after b and at the beginning.
    model = ByteNgram(b"abab", 2)
    unigram = np.full(256, 1 / 256)
    low, high = model.discounts
    counts = np.zeros(256)
    counts[ord("a")], counts[ord("b")] = 2, 1
    unigram = (np.maximum(counts - low, 0) + low * 2 * unigram) / 3
    expected = np.zeros(256)
    expected[ord("b")] = (2 - high) / 2
    expected += high * 1 / 2 * unigram
    np.testing.assert_allclose(model.distribution(b"a"), expected, atol=1e-15)
    np.testing.assert_allclose(model.distribution(b"x"), unigram, atol=1e-15)


def test_more_context_and_more_text_cost_fewer_bits():
    bits = [ByteNgram(TRAINING, order).bits(HELDOUT) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]
    assert ByteNgram(TRAINING[:500], 3).bits(HELDOUT) > bits[2]
    assert ByteNgram(b"", 3).bits(HELDOUT) == 8.0
    random = np.random.default_rng(0).integers(0, 256, 3001).astype(np.uint8).tobytes()
    assert ByteNgram(TRAINING, 5).bits(random) > 8
