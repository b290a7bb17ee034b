"""Layers in one kernel call beside the same layers one by one: the same bits, wherever the rows stand and however they are fed."""

import pytest
import torch

from weft import kernels
from weft.nn import Arena, Runner, build
from weft.nn.stretch import find_stretches
from weft.quant import quantize
from weft.spec import Quant, model_spec

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler, or WEFT_KERNELS=off")
DIM = 64


def layer(channel=None, **mixer):
    return {
        "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, **mixer},
        "channel": {"type": "gated", "hidden": 96, **(channel or {})},
    }


PLAIN, WINDOW, CAPPED = layer(rope={}), layer(rope={"base": 100.0}, window=9), layer(softcap=2.0, scale=0.2)
STACK = [{"repeat": 2, **PLAIN}, {"repeat": 3, **WINDOW}, layer({"activation": "gelu"}, rope={}), {"repeat": 2, **CAPPED}, PLAIN]


def model_of(layers, quant="int4", minimum=False, dtype=torch.float32, norm=None):
    spec = {"vocab": 40, "dim": DIM, "context": 400, "init_std": 0.3, "norm": norm or {"type": "rms"}, "layers": layers}
    made = build(model_spec(spec), seed=3)
    return quantize(made, Quant(type=quant, minimum=minimum)).to(dtype)


def run(model, tokens, chunks, page):
    """Logits after every chunk, rows fed at different places, and every byte of state at the end."""
    rows, length = tokens.shape
    with torch.inference_mode():
        arena = Arena(model, rows, length, max(chunks), page=page)
        runner, at, logits = Runner(model, arena), torch.zeros(rows, dtype=torch.long), []
        for chunk in chunks:
            fed = torch.tensor([chunk, max(chunk - 2, 0), 0 if chunk == 3 else chunk])
            arena.reserve({row: int(at[row] + fed[row]) for row in range(rows)})
            given = torch.stack([tokens[row, at[row] : at[row] + chunk] for row in range(rows)])
            logits.append(runner(given, fed).where(fed[:, None] > 0, 0))
            at += fed
    return torch.stack(logits), [buffer.clone() for name, buffer in arena.named_buffers() if name != "table"]


def one_by_one(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr("weft.nn.model.find_stretches", lambda blocks: {})
        arguments[0]._stretches = None
        result = run(*arguments)
        arguments[0]._stretches = None
    return result


@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize(
    ("quant", "minimum", "dtype"), [("int4", True, torch.float32), ("int4", False, torch.bfloat16), ("int8", False, torch.float32)]
)
def test_the_same_bits_as_layer_by_layer(monkeypatch, quant, minimum, dtype, page):
    model, tokens = model_of(STACK, quant, minimum, dtype), torch.randint(40, (3, 170), generator=torch.Generator().manual_seed(2))
    chunks = [1, 3, 130, 1, 6, 1]
    logits, state = run(model, tokens, chunks, page)
    assert {first: found.count for first, found in model._stretches.items()} == {0: 2, 2: 3, 6: 2}
    expected, expected_state = one_by_one(monkeypatch, model, tokens, chunks, page)
    assert torch.equal(logits, expected)
    assert all(map(torch.equal, state, expected_state))
    model.blocks[4].channel_norm.weight.data.mul_(1.1)
    assert not torch.equal(run(model, tokens, chunks, page)[0], logits), "control: every layer takes part"


def test_weights_that_move_are_found_again(monkeypatch):
    model, tokens = model_of([{"repeat": 3, **PLAIN}]), torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(2))
    run(model, tokens, [5, 1], 8)
    model.to(torch.bfloat16)
    with torch.no_grad():
        model.blocks[1].mixer.qkv.weight.scale.mul_(2)
    got, expected = run(model, tokens, [5, 1], 8), one_by_one(monkeypatch, model, tokens, [5, 1], 8)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize(
    ("layers", "fields"),
    [
        ([{"repeat": 2, **layer(qk_norm={"type": "rms"})}], {}),
        ([{"repeat": 2, **layer(qkv_bias=True)}], {}),
        ([{"repeat": 2, **layer(head_dim=8)}], {}),
        ([{"repeat": 2, "topology": "sandwich", **PLAIN}], {}),
        ([{"repeat": 2, **layer({"bias": True})}], {}),
        ([{"repeat": 2, **PLAIN}], {"norm": {"type": "layer"}}),
        ([{"repeat": 2, **PLAIN}], {"quant": "nf4"}),
        ([PLAIN, WINDOW], {}),
        ([{"repeat": 2, **layer(rope={}, sink_logits=True)}], {}),
        ([{"repeat": 2, **layer(rope={}, pattern={"type": "streaming", "window": 8, "sinks": 2})}], {}),
    ],
)
def test_layers_of_another_kind_are_left_to_themselves(layers, fields):
    assert find_stretches(model_of(layers, **fields).blocks) == {}
    assert find_stretches(model_of([{"repeat": 2, **PLAIN}]).blocks).keys() == {0}, "control"
