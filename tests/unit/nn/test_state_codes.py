"""Keys and values in 8 bits: how near they stay, and that nothing else about state changes."""

import pytest
import torch
from in_passes import in_passes

from weft.engine import Engine, Request, SamplingParams
from weft.nn import build
from weft.nn.state_codes import decode, encode
from weft.spec import model_spec

ATTENTION = {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}
LATENT = {"type": "latent_attention", "heads": 4, "kv_rank": 9, "nope_head_dim": 5, "rope_head_dim": 4}
LAYERS = {
    "llama": [{"repeat": 2, "mixer": ATTENTION, "channel": {"type": "gated", "hidden": 24}}],
    "latent": [{"repeat": 2, "mixer": LATENT, "channel": {"type": "gated", "hidden": 24}}],
    "ring": [{"repeat": 2, "mixer": {**ATTENTION, "window": 6}}],
    "hybrid": [{"mixer": ATTENTION}, {"mixer": {"type": "lstm"}}, {"mixer": {"type": "mamba", "state_dim": 4}}],
}


def test_vectors_come_back_within_half_a_step():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]
    back = decode(encode(x), torch.float32)
    assert encode(x).shape == (3, 5, 9)
    assert ((back - x).abs() <= 0.505 * x.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-7)).all()
    assert decode(encode(torch.zeros(2, 4)), torch.float32).eq(0).all()


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_predictions_move_little_and_depend_on_no_chunks(name, page):
    sizes = {"vocab": 30, "dim": 16, "context": 64, "init_std": 0.3, "norm": {"type": "rms"}}
    model = build(model_spec({**sizes, "layers": LAYERS[name]}), seed=1, dtype=torch.float64).eval()
    tokens = torch.randint(30, (3, 25), generator=torch.Generator().manual_seed(1))
    plain, wide = in_passes(model, tokens, [25], page=page)
    coded, narrow = in_passes(model, tokens, [25], torch.int8, page)
    difference = (coded - plain).abs().max() / plain.abs().max()
    assert 1e-6 < difference < 0.05, "eight bits show, and show little"
    chunks, _ = in_passes(model, tokens, [1, 7, 3, 14], torch.int8, page)
    torch.testing.assert_close(chunks, coded, rtol=0, atol=1e-10)
    alone, _ = in_passes(model, tokens[1:2], [25], torch.int8, page)
    torch.testing.assert_close(alone[0], coded[1], rtol=0, atol=1e-10)
    assert narrow.bytes() < wide.bytes()


def test_a_wrong_scale_shows():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    stored = encode(x)
    stored[1, -2:] = stored[2, -2:]
    assert (decode(stored, torch.float32)[1] - x[1]).abs().max() > 0.05


def test_an_engine_grows_its_pages_and_answers_as_one_that_has_enough():
    sizes = {"vocab": 30, "dim": 16, "context": 64, "init_std": 0.3, "norm": {"type": "rms"}}
    model = build(model_spec({**sizes, "layers": LAYERS["llama"]}), seed=1, dtype=torch.float64)
    model.int8_state = True
    request = Request([index % 30 for index in range(40)], SamplingParams(max_tokens=12))
    grown, whole = (Engine(model, page=page).generate([request])[0].ids for page in (4, 64))
    assert grown == whole
