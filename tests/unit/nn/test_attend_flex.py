"""FlexAttention under Weft's rules against the naive form: outputs here, gradients where there is a GPU."""

import pytest
import torch

from weft.nn import Step, attend_flex, attention, build
from weft.nn.attend import attend_naive
from weft.nn.attend_banded import with_sink
from weft.nn.step import allowed
from weft.spec import Band, Fixed, Strided, model_spec

RULES = [Band(9), Band(7, 3, 4), Strided(stride=7), Fixed(stride=9, summary=2, part="far")]
LENGTH = 150


def inputs(device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, LENGTH, 6, 16), (2, LENGTH, 3, 16), (2, LENGTH, 3, 16), (6,), (2, LENGTH, 6, 16)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes]


def step_of(packed, device="cpu"):
    index = torch.arange(LENGTH, device=device).expand(2, -1)
    return Step.packed(index % 47, index // 47) if packed else Step.parallel(index)


def mask_of(step, rule):
    return allowed(step, step.positions) & rule.allows(step.positions[:, :, None], step.positions[:, None, :])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_equals_naive(rule, packed):
    q, k, v, sink, _ = inputs()
    step = step_of(packed)
    with torch.no_grad():
        for softcap in (None, 1.5):
            want = attend_naive(q, k, v, mask_of(step, rule), 0.3, softcap, sink)
            got = with_sink(*attend_flex.attend_flex(q, k, v, attend_flex.block_mask(step, rule), 0.3, softcap), sink)
            assert got.dtype == v.dtype
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # its logarithms are float32 on a CPU
        other = attend_flex.block_mask(step_of(not packed), rule)
        assert (with_sink(*attend_flex.attend_flex(q, k, v, other, 0.3), sink) - want).abs().max() > 1e-3, "control: another packing shows"


def test_blocks_that_nobody_sees_are_left_out():
    step = Step.parallel(torch.zeros(1, 1024))
    assert attend_flex.block_mask(step, Band(100)).sparsity() > 70
    assert attend_flex.block_mask(step, Band(1024)).sparsity() < 50


def test_a_cpu_and_float64_do_not_take_it():
    q = torch.zeros(1, 3, 2, 16)
    assert not attend_flex.suits_flex(q)
    assert not attend_flex.suits_flex(q.to("meta", torch.float64))


def results(attend, q, k, v, sink, g):
    leaves = [t.clone().requires_grad_() for t in (q, k, v, sink)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_gradients_on_a_gpu(rule, packed):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    tensors = inputs("cuda", torch.float32)
    step = step_of(packed, "cuda")
    mask, blocks = mask_of(step, rule), attend_flex.block_mask(step, rule)
    want = results(lambda q, k, v, sink: attend_naive(q, k, v, mask, 0.3, 1.5, sink), *(t.double() for t in tensors))
    got = results(lambda q, k, v, sink: with_sink(*attend_flex.attend_flex(q, k, v, blocks, 0.3, 1.5), sink), *tensors)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 5e-3 * b.norm()  # products round to TF32


@pytest.mark.gpu
@pytest.mark.parametrize(
    "pattern", [{"window": 9}, {"pattern": {"type": "fixed", "stride": 9}}, {"window": 9, "sink_logits": True}], ids=str
)
def test_a_model_takes_it_on_a_gpu(monkeypatch, pattern):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    mixer = {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}, **pattern}
    model = build(model_spec({"vocab": 50, "dim": 64, "layers": [{"mixer": mixer}] * 2}), seed=1)
    tokens = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    want = model(tokens).hidden
    calls = []
    taken = attention.attend_flex
    monkeypatch.setattr(attention, "attend_flex", lambda *arguments: (calls.append(1), taken(*arguments))[1])
    got = model.to("cuda")(tokens.to("cuda")).hidden
    assert len(calls) == 2
    assert (got.cpu() - want).norm() < 5e-3 * want.norm()
