"""Rings with pinned slots: what they hold after any writes, in every dtype of state, and that the pinned slots are needed.

And that kernels which know windows alone are not asked for what they do not know.
"""

import random

import pytest
import torch

from weft import kernels
from weft.nn import Arena, Step, attention, build
from weft.nn.views import Ring
from weft.spec import model_spec

STREAMING = {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}, "pattern": {"type": "streaming", "window": 6, "sinks": 3}}


@pytest.mark.parametrize(
    ("window", "pinned", "chunk", "longest"), [(6, 3, 5, 60), (1, 2, 1, 20), (4, 0, 3, 40), (8, 20, 7, 13), (9, 5, 4, 12)]
)
def test_a_ring_holds_the_pinned_and_the_newest(window, pinned, chunk, longest):
    """Entries are their own positions, so that what is read back is checked against what it claims to be."""
    rng = random.Random(window)
    capacity = min(pinned + window - 1 + chunk, longest)
    view, lens = Ring(torch.full((3, capacity + 1, 1), -7.0), 1, None, pinned), [0, 0, 0]
    while min(lens) < longest:
        n_new = [min(rng.randint(0, chunk), longest - length) for length in lens]
        step = Step(torch.tensor(lens), torch.tensor(n_new), chunk)
        view.write(step.positions[..., None].float(), step)
        values, positions = view.read(step)
        for row, (length, new) in enumerate(zip(lens, n_new, strict=True)):
            kept = {int(p): v.item() for p, v in zip(positions[row], values[row, :, 0], strict=True) if p >= 0}
            wanted = {p for p in range(length + new) if p < pinned or p > length - window}
            assert wanted <= set(kept) <= set(range(length + new))
            assert all(kept[p] == p for p in wanted)
            lens[row] += rng.randint(0, new)  # a part of the draft is rejected


def drift(dtype, pinned=None):
    """Decoding in chunks of 3 in state of this dtype against one pass, relative to the largest logit."""
    model = build(model_spec({"vocab": 31, "dim": 64, "init_std": 0.3, "layers": [{"mixer": STREAMING}] * 2}), dtype=torch.float64, seed=0)
    tokens = torch.randint(31, (2, 42), generator=torch.Generator().manual_seed(1))
    arena, worst = Arena(model, 2, 42, 3, dtype=dtype), 0.0
    for layer in arena.views():
        for view in layer["mixer"].values():
            assert view.pinned == 3
            view.pinned = view.pinned if pinned is None else pinned
    with torch.no_grad():
        truth = model.eval()(tokens).logits
        for start in range(0, 42, 3):
            output = model(tokens[:, start : start + 3], arena.step(torch.tensor([3, 3]), 3), arena.views())
            arena.commit(output.pending, torch.tensor([3, 3]))
            worst = max(worst, (output.logits - truth[:, start : start + 3]).abs().max().item())
    return worst / truth.abs().max().item()


def test_state_in_any_dtype_and_without_pins():
    assert drift(torch.float64) < 1e-10
    assert drift(torch.float32) < 1e-5
    assert 1e-4 < drift(torch.int8) < 0.1
    assert drift(torch.float64, pinned=2) > 0.01, "control: a ring that pins one position less loses it"


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler, or WEFT_KERNELS=off")
@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"pattern": None, "window": 6}, 2),
        ({}, 0),
        ({"pattern": None, "sink_logits": True}, 0),
        ({"pattern": {"type": "fixed", "stride": 5}}, 0),
    ],
    ids=str,
)
def test_kernels_are_asked_for_what_they_know(monkeypatch, changes, taken):
    spec = {"vocab": 31, "dim": 64, "init_std": 0.3, "layers": [{"mixer": {**STREAMING, **changes}}] * 2}
    model = build(model_spec(spec), dtype=torch.float32, seed=0).eval()
    tokens = torch.randint(31, (1, 20), generator=torch.Generator().manual_seed(1))
    calls, original = [], attention.attend_in_place
    monkeypatch.setattr(attention, "attend_in_place", lambda *arguments: (calls.append(1), original(*arguments))[1])
    arena = Arena(model, 1, 20, 20)
    with torch.inference_mode():
        got = model(tokens, arena.step(torch.tensor([20]), 20), arena.views()).logits
        assert (got - model(tokens).logits).abs().max() < 1e-4
    assert len(calls) == taken
