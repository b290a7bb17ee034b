"""Every native kernel beside its naive twin: the same numbers, whatever the company, and a control that differs."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from weft import kernels
from weft.nn import Arena, Runner, build
from weft.nn.channel import Gated
from weft.nn.norm import RMSNorm
from weft.spec import RMSNorm as RMSNormSpec
from weft.spec import model_spec

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler, or WEFT_KERNELS=off")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}  # relative to the largest number


@pytest.fixture
def naive(monkeypatch):
    """Calls a function without the kernels."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda *tensors: False)
            return function()

    return call


def near(got, want, dtype):
    error = ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 33), (7, 576)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm(naive, dtype, rows, width, unit_offset):
    norm = RMSNorm(RMSNormSpec(eps=1e-5, unit_offset=unit_offset), width)
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(dtype)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        got, want = norm(x), naive(lambda: norm(x))
        near(got, want, dtype)
        norm.eps = 1.0
        assert ((norm(x) - want).abs().max() / want.abs().max()).item() > 2 * TOLERANCE[dtype], "control: another eps shows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [24, 33])
def test_silu_gate(naive, dtype, hidden):
    torch.manual_seed(1)
    spec = model_spec({"vocab": 8, "dim": 32, "layers": [{"channel": {"type": "gated", "hidden": hidden}}]})
    gated = build(spec, dtype=dtype, seed=1).blocks[0].channel
    assert isinstance(gated, Gated)
    x = (torch.randn(3, 5, 32) * 40).to(dtype)  # far into both tails of the sigmoid
    with torch.inference_mode():
        got, want = gated(x, None)[0], naive(lambda: gated(x, None)[0])
    near(got, want, dtype)
    assert got.isfinite().all()


MIXERS = {
    "mha": {"heads": 2, "head_dim": 16},
    "gqa": {"heads": 6, "kv_heads": 2, "head_dim": 16, "rope": {}},
    "seven_share": {"heads": 7, "kv_heads": 1, "head_dim": 32, "rope": {}},
    "window": {"heads": 4, "kv_heads": 2, "head_dim": 16, "window": 9, "rope": {}},
    "softcap": {"heads": 2, "head_dim": 48, "softcap": 2.0},
    "qk_norm": {"heads": 2, "kv_heads": 1, "head_dim": 16, "rope": {}, "qk_norm": {"type": "rms"}},
}


def attention_model(name, dtype=torch.float32):
    mixer = {"type": "attention", **MIXERS[name]}
    return build(
        model_spec({"vocab": 40, "dim": 24, "context": 400, "init_std": 0.3, "layers": [{"repeat": 2, "mixer": mixer}]}),
        seed=3,
        dtype=dtype,
    )


def decode(model, tokens, chunks, page=None):
    """Logits after every chunk, of rows fed in chunks of these lengths."""
    rows, length = tokens.shape
    with torch.inference_mode():
        arena = Arena(model.eval(), rows, length, max(chunks), page=page)
        runner, start, logits = Runner(model, arena), 0, []
        for chunk in chunks:
            arena.reserve(dict.fromkeys(range(rows), start + chunk))
            logits.append(runner(tokens[:, start : start + chunk], torch.full((rows,), chunk)))
            start += chunk
    return torch.stack(logits)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("page", [None, 8])
def test_attend_in_place(naive, name, page):
    model, tokens = attention_model(name), torch.randint(40, (3, 141), generator=torch.Generator().manual_seed(2))
    chunks = [1, 3, 130, 1, 6]  # over the edges of pages, of the ring, and of the kernel's blocks of 128
    got, want = decode(model, tokens, chunks, page), naive(lambda: decode(model, tokens, chunks, page))
    near(got, want, torch.float32)
    tokens[:, 133] = (tokens[:, 133] + 1) % 40
    other = decode(model, tokens, chunks, page)
    assert torch.equal(other[:2], got[:2])
    assert not torch.allclose(other[3], got[3], atol=1e-4), "control: a token changes what comes after"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gqa", "window"])
def test_attention_depends_on_neither_company_nor_chunks(name, dtype):
    """Bit by bit in the kernel; the products around it keep that in bfloat16, and in float32 to rounding."""
    model, tokens = attention_model(name, dtype), torch.randint(40, (3, 141), generator=torch.Generator().manual_seed(2))
    whole = decode(model, tokens, [140, 1], page=8)
    alone = torch.cat([decode(model, tokens[row : row + 1], [7] * 20 + [1], page=8)[-1:] for row in range(3)], 1)
    if dtype == torch.bfloat16:
        assert torch.equal(whole[-1], alone[0])
    else:
        near(alone[0], whole[-1], dtype)


def test_a_session_settles_the_question_and_gives_it_back():
    x = torch.zeros(2)
    assert not kernels.usable(x), "gradients are on"
    with torch.no_grad():
        assert kernels.usable(x)
        assert not kernels.usable(x.double())
        assert not kernels.usable(x, x.bfloat16())
        with kernels.unused():
            assert not kernels.usable(x)
            with kernels.settled(torch.float32, torch.device("cpu")):
                assert not kernels.usable(x), "nor where someone asks for them inside"
        with kernels.settled(torch.float64, torch.device("cpu"), coarse=True):
            assert kernels.coarse()
        assert not kernels.coarse()


def test_a_session_is_one_threads_own():
    """A server runs each model in a thread: one that reads a prompt coarsely must not make another's token coarse."""
    inside, leave, seen = threading.Event(), threading.Event(), []

    def first():
        with torch.no_grad(), kernels.settled(torch.float32, torch.device("cpu"), coarse=True):
            seen.append(kernels.coarse())
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=first)
    other.start()
    assert inside.wait(10)
    with torch.no_grad(), kernels.settled(torch.bfloat16, torch.device("cpu")):
        seen.append(kernels.coarse())
        leave.set()
        other.join()
    assert seen == [True, False]
    assert not kernels.usable(torch.zeros(1)), "nothing stays behind, and gradients are on"


def test_kernels_can_be_switched_off():
    program = "from weft import kernels; assert not kernels.available()"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "WEFT_KERNELS": "off"})
