"""Held-out scores: every token once, with the context it was promised, equal to the definition."""

import math

import numpy as np
import pytest
import torch

from weft.nn import build
from weft.quickstart.scoring import score_stream, windows
from weft.spec import model_spec

SPEC = model_spec(
    {
        "vocab": 37,
        "dim": 16,
        "norm": {"type": "rms"},
        "layers": [{"mixer": {"type": "attention", "heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 24}}],
        "init_std": 0.3,
    }
)


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(1000, 64, 32), (1001, 64, 64), (65, 64, 10), (64, 64, 10), (2, 64, 10), (77, 13, 5)]
)
def test_windows_score_every_token_once_with_enough_before_it(count, length, stride):
    cut = windows(count, length, stride)
    scored = [token for _, stop, first in cut for token in range(first, stop)]
    assert scored == list(range(1, count))
    assert all(0 <= start < first <= stop - 1 and stop - start - 1 <= length for start, stop, first in cut)
    assert all(first - start >= length - stride + 1 for start, _, first in cut[1:])


def naive(model, stream, length, stride):
    """Nats of each token by itself."""
    nats = 0.0
    for start, stop, first in windows(len(stream), length, stride):
        logs = model(torch.from_numpy(stream[start : stop - 1])[None]).logits[0].log_softmax(-1)
        nats -= sum(logs[token - start - 1, stream[token]].item() for token in range(first, stop))
    return nats


def test_the_score_is_the_definition():
    model = build(SPEC, seed=1).eval()
    stream = np.random.default_rng(0).integers(0, 37, 301)
    with torch.no_grad():
        expected = naive(model, stream, 32, 13)
        other = naive(model, stream, 32, 32)
    seen = []
    score = score_stream(model, stream, 500, 32, 13, torch.float32, lambda done, total: seen.append((done, total)))
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.nats != pytest.approx(other, rel=1e-4)
    assert score.tokens == 300
    assert score.bits_per_byte == score.nats / math.log(2) / 500
    assert seen[-1][0] == seen[-1][1]


def test_bfloat16_is_close():
    model = build(SPEC, seed=1).eval()
    stream = np.random.default_rng(0).integers(0, 37, 301)
    exact = score_stream(model, stream, 500, 32, 16, torch.float32).nats
    rounded = score_stream(model, stream, 500, 32, 16, torch.bfloat16).nats
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != exact
