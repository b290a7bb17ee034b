"""Attention in blocks of queries against the naive form, and the conditions under which a model takes it."""

import pytest
import torch

from weft.nn import Step, attention, build
from weft.nn.attend import attend_naive
from weft.nn.attend_blocked import BLOCK, MAX_BLOCKS, attend_blocked, causal_bias
from weft.spec import model_spec

# T, window, tokens a document: one block and several, cut short, blocks longer than BLOCK, windows across blocks
CASES = [
    (5, None, None),
    (BLOCK, None, 17),
    (300, None, 37),
    (300, 37, None),
    (131, 1, None),
    (290, 150, 70),
    (MAX_BLOCKS * BLOCK + 76, 200, 90),
]


def inputs(length, window, document, dtype=torch.float64):
    """q, k, v, the naive form's mask, the blocked form's bias, and a gradient. Values are narrower than keys."""
    generator = torch.Generator().manual_seed(length)
    q, g = (torch.randn(2, length, 6, width, generator=generator, dtype=dtype) for width in (4, 3))
    k, v = (torch.randn(2, length, 3, width, generator=generator, dtype=dtype) for width in (4, 3))
    index = torch.arange(length)
    sizes = (length, length) if document is None else (document, document + 3)
    mask = (index <= index[:, None]) & torch.stack([index[:, None] // size == index // size for size in sizes])
    if window is not None:
        mask = mask & (index[:, None] - index < window)
    return q, k, v, mask, causal_bias(torch.stack([index % size for size in sizes]), window), g


def results(attend, q, k, v, g):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize(("length", "window", "document"), CASES)
def test_equals_naive(length, window, document):
    q, k, v, mask, bias, g = inputs(length, window, document)
    want = results(lambda q, k, v: attend_naive(q, k, v, mask, 0.4), q, k, v, g)
    got = results(lambda q, k, v: attend_blocked(q, k, v, bias, 0.4, window), q, k, v, g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    if window != 1:
        other = causal_bias(torch.arange(length).expand(2, -1) % 4, window)
        wrong = results(lambda q, k, v: attend_blocked(q, k, v, other, 0.4, window), q, k, v, g)
        assert all((a - b).abs().max() > 1e-6 for a, b in zip(wrong, want, strict=True)), "control: shorter documents show everywhere"


def test_bfloat16_is_as_near_to_the_truth_as_the_fused_kernel():
    q, k, v, mask, bias, g = inputs(300, None, 37)
    want = results(lambda q, k, v: attend_naive(q, k, v, mask, 0.4), q, k, v, g)
    narrow = [t.bfloat16() for t in (q, k, v, g)]
    errors = {}
    for name, attend in {
        "blocked": lambda q, k, v: attend_blocked(q, k, v, bias, 0.4),
        "fused": lambda q, k, v: attention.attend_fused(q, k, v, mask, 0.4),
    }.items():
        got = results(attend, *narrow[:3], narrow[3])
        errors[name] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    assert all(blocked < 1.5 * fused for blocked, fused in zip(errors["blocked"], errors["fused"], strict=True)), errors
    assert max(errors["fused"]) < 0.02, errors


def test_huge_scores_stay_finite():
    q, k, v, _, bias, g = inputs(140, None, 37, torch.float32)
    for out in results(lambda q, k, v: attend_blocked(1e4 * q, 1e4 * k, v, bias, 1.0), q, k, v, g):
        assert torch.isfinite(out).all()


def model_of(**mixer):
    mixer = {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}, **mixer}
    layers = [{"repeat": 2, "mixer": mixer, "channel": {"type": "gated", "hidden": 48}}]
    return build(model_spec({"vocab": 50, "dim": 32, "layers": layers}), dtype=torch.float64, seed=1)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("packed", [True, False])
def test_a_model_takes_it_and_agrees_with_the_fused_kernel(monkeypatch, packed, window):
    model = model_of(window=window)
    tokens = torch.randint(0, 50, (2, 150), generator=torch.Generator().manual_seed(2))
    index = torch.arange(150).expand(2, -1)
    step = (lambda: Step.packed(index % 40, index // 40)) if packed else (lambda: Step.parallel(tokens, torch.tensor([150, 90])))
    calls = []
    monkeypatch.setattr(attention, "attend_blocked", lambda *arguments: (calls.append(1), attend_blocked(*arguments))[1])
    got = model(tokens, step()).hidden
    other = model(tokens, Step.parallel(tokens) if packed else Step.packed(index % 40, index // 40)).hidden
    assert len(calls) == 4
    monkeypatch.setattr(attention, "MAX_LENGTH", 149)
    want = model(tokens, step()).hidden
    assert len(calls) == 4
    valid = step().valid
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=1e-12)
    assert (other[:, 60:80] - want[:, 60:80]).abs().max() > 1e-4, "control: another packing shows"


def test_the_bias_is_an_operator_that_compilers_understand():
    torch.library.opcheck(causal_bias, (torch.arange(7)[None] % 3, 2))
    torch.library.opcheck(causal_bias, (torch.arange(7).expand(2, -1),))


def test_what_it_does_not_suit_goes_elsewhere(monkeypatch):
    monkeypatch.setattr(attention, "attend_blocked", lambda *arguments: pytest.fail("blocked attention was taken"))
    tokens = torch.zeros(1, 9, dtype=torch.long)
    for mixer in ({"softcap": 5.0}, {"causal": False}):
        assert torch.isfinite(model_of(**mixer)(tokens).hidden).all()
    monkeypatch.setattr(attention, "MAX_LENGTH", 8)
    assert torch.isfinite(model_of()(tokens).hidden).all()
