"""Attention to bands against the naive form: outputs and gradients, packed documents, and work that grows linearly."""

import pytest
import torch

from weft.nn import Step, attend_banded, attention, build
from weft.nn.attend import attend_grouped, attend_naive
from weft.nn.attend_banded import BLOCK, with_sink
from weft.nn.step import allowed
from weft.spec import Band, Dilated, Strided, model_spec

# T, band, tokens a document (None: one), soft cap
CASES = [
    (5, Band(2), None, None),
    (1, Band(3, 2, 1), None, None),
    (BLOCK + 3, Band(7), None, None),
    (2 * BLOCK + 37, Band(BLOCK + 29), 170, None),
    (2 * BLOCK + 37, Band(1), 17, None),
    (BLOCK + 37, Band(20), 50, 1.5),
    (BLOCK + 38, Band(9, 1, 4), None, None),
    (BLOCK + 38, Band(9, 1, 4), 31, 1.5),
    (3 * BLOCK + 2, Band(40, 3), None, None),
    (3 * BLOCK + 2, Band(6, 5, 3), 67, None),
    (41, Band(60, 2, 50), 23, None),
]


def inputs(length, document, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    q, g = (torch.randn(2, length, 6, 4, generator=generator, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(2, length, 3, 4, generator=generator, dtype=dtype) for _ in range(2))
    index = torch.arange(length)
    step = Step.parallel(torch.zeros(2, length))
    if document is not None:
        sizes = torch.tensor([[document], [document + 3]])
        step = Step.packed(index % sizes, index // sizes)
    return q, k, v, step, g, torch.randn(6, generator=generator, dtype=dtype)


def mask_of(step, band):
    query, key = step.positions[:, :, None], step.positions[:, None, :]
    return allowed(step, step.positions) & band.allows(query, key)


def results(attend, q, k, v, sink, g):
    leaves = [t.clone().requires_grad_() for t in (q, k, v, sink)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def banded(step, band, softcap):
    positions = None if step.plain else step.positions
    return lambda q, k, v, sink: with_sink(*attend_banded.attend_banded(q, k, v, positions, band, 0.4, softcap), sink)


@pytest.mark.parametrize(("length", "band", "document", "softcap"), CASES)
def test_equals_naive(length, band, document, softcap):
    q, k, v, step, g, sink = inputs(length, document)
    mask = mask_of(step, band)
    want = results(lambda q, k, v, sink: attend_naive(q, k, v, mask, 0.4, softcap, sink), q, k, v, sink, g)
    got = results(banded(step, band, softcap), q, k, v, sink, g)
    grouped = results(lambda q, k, v, sink: attend_grouped(q, k, v, mask, 0.4, softcap, 0.0, sink), q, k, v, sink, g)
    for name, a, b, c in zip(("out", "q", "k", "v", "sink"), got, want, grouped, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=name)
        torch.testing.assert_close(c, b, rtol=0, atol=1e-11, msg=name)
    if length > 5 and band.width < length:
        wrong = results(banded(step, band._replace(width=band.width + 1), softcap), q, k, v, sink, g)
        assert all((a - b).abs().max() > 1e-6 for a, b in zip(wrong, want, strict=True)), "control: one key more shows everywhere"


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("document", [None, 50])
@pytest.mark.parametrize("pattern", [Strided(stride=2), Strided(stride=7, part="far"), Strided(stride=20)], ids=repr)
def test_strided_equals_naive(pattern, document, softcap):
    q, k, v, step, g, sink = inputs(BLOCK + 39, document)
    positions, mask = None if step.plain else step.positions, mask_of(step, pattern)

    def strided(pattern):
        return lambda q, k, v, sink: with_sink(*attend_banded.attend_strided(q, k, v, positions, pattern, 0.4, softcap), sink)

    want = results(lambda q, k, v, sink: attend_naive(q, k, v, mask, 0.4, softcap, sink), q, k, v, sink, g)
    got = results(strided(pattern), q, k, v, sink, g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    wrong = results(strided(Strided(stride=pattern.stride + 1, part=pattern.part)), q, k, v, sink, g)
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(wrong, want, strict=True)), "control: another stride shows everywhere"


def test_without_a_sink_and_in_low_precision():
    q, k, v, step, g, sink = inputs(BLOCK + 38, 31)
    band = Band(9, 2, 4)
    mask = mask_of(step, band)
    want = results(lambda q, k, v, sink: attend_naive(q, k, v, mask, 0.4) + 0 * sink.sum(), q, k, v, sink, g)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        narrow = [t.to(dtype) for t in (q, k, v, sink, g)]
        got = results(lambda q, k, v, sink: attend_banded.attend_banded(q, k, v, step.positions, band, 0.4)[0] + 0 * sink.sum(), *narrow)
        assert all(a.dtype == dtype for a in got)
        assert all((a.double() - b).norm() <= tolerance * b.norm() for a, b in zip(got, want, strict=True))


def test_huge_scores_stay_finite():
    q, k, v, step, g, sink = inputs(BLOCK + 38, 31, torch.float32)
    for out in results(banded(step, Band(9, 2, 4), None), 1e4 * q, 1e4 * k, v, sink, g):
        assert torch.isfinite(out).all()


def test_the_operators_are_understood_by_compilers():
    q, k, v, _, _, _ = inputs(9, None)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    first = torch.arange(9)[None] // 4 * 4
    torch.library.opcheck(attend_banded.attend_window, (*leaves, first, 3, 0.4, 1.5))


@pytest.mark.parametrize("band", [Band(64), Band(16, 4), Band(60, 1, 4)], ids=repr)
def test_scores_and_what_is_kept_grow_linearly(monkeypatch, band):
    """Counted, not timed: dense attention would have sixteen times the scores at four times the length."""
    counts = []
    plain = attend_banded._scores

    def counting(q, k, *rest):
        scores, hidden = plain(q, k, *rest)
        counts[-1]["scores"] += scores.numel()
        return scores, hidden

    def keep(tensor):
        counts[-1]["kept"] += tensor.numel()
        return tensor

    monkeypatch.setattr(attend_banded, "_scores", counting)
    for length in (1024, 4096):
        counts.append({"scores": 0, "kept": 0})
        q, k, v = (torch.zeros(1, length, 1, 2, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out, _ = attend_banded.attend_banded(q, k, v, None, band, 1.0)
        out.sum().backward()
    short, long = counts
    assert long["scores"] < 4.5 * short["scores"]
    assert long["kept"] < 4.5 * short["kept"]
    assert long["scores"] < 2 * 4096 * (band.width + BLOCK) < 4096 * 4096 / 2, "forward and backward together are below one dense triangle"


def model_of(**mixer):
    mixer = {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}, **mixer}
    layers = [{"repeat": 2, "mixer": mixer, "channel": {"type": "gated", "hidden": 48}}]
    return build(model_spec({"vocab": 50, "dim": 32, "layers": layers}), dtype=torch.float64, seed=1)


MIXERS = [
    {"window": 9, "softcap": 2.0},
    {"window": 9, "sink_logits": True},
    {"pattern": {"type": "dilated", "window": 5, "dilation": 3, "global_tokens": 2}},
    {"pattern": {"type": "streaming", "window": 7, "sinks": 3}, "sink_logits": True},
    {"pattern": {"type": "strided", "stride": 8, "part": "local"}},
]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_a_model_takes_it_and_agrees_with_masks(monkeypatch, mixer, packed):
    model = model_of(**mixer)
    tokens = torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(2))
    index = torch.arange(70).expand(2, -1)
    step = (lambda: Step.packed(index % 40, index // 40)) if packed else (lambda: Step.parallel(tokens, torch.tensor([70, 33])))
    calls = []
    taken = attention.attend_banded
    monkeypatch.setattr(attention, "attend_banded", lambda *arguments: (calls.append(1), taken(*arguments))[1])
    got = model(tokens, step()).hidden
    assert len(calls) == 2
    monkeypatch.setattr(attention.Attention, "_suits_bands", lambda *_: False)
    monkeypatch.setattr(attention, "MAX_LENGTH", 0)
    want = model(tokens, step()).hidden
    assert len(calls) == 2
    valid = step().valid
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=1e-11)


def test_long_texts_with_windows_go_by_bands_and_others_by_blocks_or_masks(monkeypatch):
    tokens = torch.zeros(1, 33, dtype=torch.long)
    monkeypatch.setattr(attention, "MAX_LENGTH", 32)
    calls = []
    taken = attention.attend_banded
    monkeypatch.setattr(attention, "attend_banded", lambda *arguments: (calls.append(1), taken(*arguments))[1])
    for mixer, times in (({"window": 9}, 2), ({"window": 33}, 0), ({}, 0), ({"pattern": Dilated(window=12, dilation=3)}, 0)):
        calls.clear()
        model_of(**mixer)(tokens)
        assert len(calls) == times, mixer
    monkeypatch.setattr(attention, "MAX_LENGTH", 64)
    calls.clear()
    model_of(window=9)(tokens)
    assert not calls
