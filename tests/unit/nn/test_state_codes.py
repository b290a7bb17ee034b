"""Keys and values in 8 bits: how near they stay, and that nothing else about state changes."""

import pytest
import torch

from weft.engine import Engine, Request, SamplingParams
from weft.nn import Arena, build
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


def logits(model, tokens, sizes, state=None, page=None):
    """Logits [B, T, V] of tokens fed in pieces of these sizes."""
    rows, length = tokens.shape
    arena = Arena(model, rows, length, max(sizes), dtype=state, page=page)
    parts, at = [], 0
    with torch.no_grad():
        for size in sizes:
            arena.reserve(dict.fromkeys(range(rows), at + size))
            n_new = torch.full((rows,), size)
            output = model(tokens[:, at : at + size], arena.step(n_new, size), arena.views())
            arena.commit(output.pending, n_new)
            parts.append(output.logits)
            at += size
    return torch.cat(parts, 1), arena


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_predictions_move_little_and_depend_on_no_chunks(name, page):
    sizes = {"vocab": 30, "dim": 16, "context": 64, "init_std": 0.3, "norm": {"type": "rms"}}
    model = build(model_spec({**sizes, "layers": LAYERS[name]}), seed=1, dtype=torch.float64).eval()
    tokens = torch.randint(30, (3, 25), generator=torch.Generator().manual_seed(1))
    plain, wide = logits(model, tokens, [25], page=page)
    coded, narrow = logits(model, tokens, [25], torch.int8, page)
    difference = (coded - plain).abs().max() / plain.abs().max()
    assert 1e-6 < difference < 0.05, "eight bits show, and show little"
    chunks, _ = logits(model, tokens, [1, 7, 3, 14], torch.int8, page)
    torch.testing.assert_close(chunks, coded, rtol=0, atol=1e-10)
    alone, _ = logits(model, tokens[1:2], [25], torch.int8, page)
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
