"""Norms, positions and dropout against their definitions."""

import math

import pytest
import torch

from weft.nn import build
from weft.nn.norm import build_norm
from weft.nn.position import Sinusoidal
from weft.nn.rope import Rope, rotate
from weft.spec import LayerNorm, RMSNorm, model_spec
from weft.spec import Rope as RopeSpec
from weft.spec import Sinusoidal as SinusoidalSpec


def test_norms_follow_their_formulas():
    x = torch.randn(3, 7, dtype=torch.float64) * 4 + 1
    rms, gemma, layer = build_norm(RMSNorm(), 7), build_norm(RMSNorm(unit_offset=True), 7), build_norm(LayerNorm(bias=False), 7)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for norm in (rms, gemma):
        torch.testing.assert_close(norm.double()(x), want, rtol=0, atol=1e-12)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(layer.double()(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt(), rtol=0, atol=1e-12)
    with torch.no_grad():
        rms.weight.fill_(0.5)
        gemma.weight.fill_(0.5)
    torch.testing.assert_close(rms(x), 0.5 * want)
    torch.testing.assert_close(gemma(x), 1.5 * want)


def test_rms_norm_of_large_bfloat16_does_not_overflow():
    x = torch.full((1, 8), 3e20, dtype=torch.bfloat16)
    assert torch.isfinite(build_norm(RMSNorm(), 8).bfloat16()(x / 1e2)).all()


def test_sinusoids_of_the_2017_paper():
    waves = Sinusoidal(SinusoidalSpec(), 6)(torch.zeros(1, 50, 6, dtype=torch.float64), torch.arange(50)[None])[0]
    for position in (0, 1, 49):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            want = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert abs(waves[position, channel].item() - want) < 1e-5


def test_rotary_scores_depend_on_distance_alone():
    rope = Rope(RopeSpec(), 8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        (ci, si), (cj, sj) = (rope._tables(torch.tensor([[p]])) for p in (i, j))
        return (rotate(q, ci.double(), si.double()) * rotate(k, cj.double(), sj.double())).sum().item()

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_rotary_frequencies_stay_float32_when_the_model_is_cast():
    spec = model_spec({"vocab": 9, "dim": 8, "layers": [{"mixer": {"type": "attention", "heads": 2, "rope": {}}}]})
    model = build(spec, seed=0)
    before = model.blocks[0].mixer.rope.inverse_frequencies.clone()
    after = model.bfloat16().blocks[0].mixer.rope.inverse_frequencies
    assert after.dtype == torch.float32
    assert torch.equal(before, after)


def test_dropout_acts_in_training_only():
    layers = [{"mixer": {"type": "attention", "heads": 2}, "channel": {"type": "mlp", "hidden": 8}}]
    plain = {"vocab": 9, "dim": 8, "layers": layers, "init_std": 0.3}
    tokens = torch.arange(9)[None]
    clean = build(model_spec(plain), seed=0)(tokens).logits
    for place in ("embed", "attention", "residual"):
        model = build(model_spec({**plain, "dropout": {place: 0.5}}), seed=0)
        torch.manual_seed(0)
        noisy, other = model.train()(tokens).logits, model(tokens).logits
        assert not torch.allclose(noisy, other), place
        assert torch.equal(model.eval()(tokens).logits, clean), place


def test_seeded_initial_weights_repeat_and_leave_the_global_generator_alone():
    spec = model_spec({"vocab": 9, "dim": 8, "layers": [{"mixer": {"type": "lstm"}}]})
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, third = build(spec, seed=1), build(spec, seed=1), build(spec, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.embed.weight, second.embed.weight)
    assert not torch.equal(first.embed.weight, third.embed.weight)
