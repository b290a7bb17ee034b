"""Experts in fewer bits: each is rounded as if it stood alone, routers stay, and a row has the same bits in any company."""

import pytest
import torch

from weft import kernels
from weft.engine import Engine, Request, SamplingParams
from weft.engine.measure import bytes_read
from weft.nn import build
from weft.nn.linear import num_plain, packed_weight
from weft.nn.packed import PackedWeight
from weft.quant import Reference, dequantize, quantize
from weft.quant.rounding import round_to_nearest
from weft.spec import Quant, model_spec
from weft.weights.load import load_model
from weft.weights.map import stored_state
from weft.weights.save import save_model

MIXER = {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}
EXPERTS = {"type": "experts", "experts": 5, "top_k": 2, "hidden": 32, "shared": 1, "score": "sigmoid", "choice_bias": True}
SIZES = {"vocab": 50, "dim": 64, "context": 128, "init_std": 0.15, "norm": {"type": "rms"}}


def make(**changes):
    model = build(model_spec({**SIZES, "layers": [{"repeat": 2, "mixer": MIXER, "channel": {**EXPERTS, **changes}}]}), seed=4).eval()
    for block in model.blocks:
        block.channel.router.choice_bias.copy_(torch.linspace(-0.1, 0.1, 5))
    return model


@pytest.mark.parametrize("quant", [Quant(type="int8"), Quant(type="int4", minimum=True), Quant(type="nf4")], ids=lambda q: q.type)
def test_each_expert_is_rounded_as_if_it_stood_alone(quant):
    model = make()
    made = quantize(model, quant)
    units = made.blocks[1].channel.units
    assert isinstance(units.gate_up, PackedWeight)
    for name in ("gate_up", "down"):
        whole, stacked = getattr(units, name), getattr(model.blocks[1].channel.units, name)
        alone = packed_weight(*stacked.shape[1:], quant).fill(*round_to_nearest(stacked[3], quant))
        assert torch.equal(whole.dequantise().view(stacked.shape)[3], alone.dequantise())
    router = made.blocks[1].channel.router
    assert torch.equal(router.weight, model.blocks[1].channel.router.weight)
    assert torch.equal(router.choice_bias, model.blocks[1].channel.router.choice_bias)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        got, want, original = (each(tokens).logits for each in (made, dequantize(made), model))
    assert (got - want).abs().max() < 3e-4 * want.abs().max()
    assert (got - original).abs().max() > 3e-3 * want.abs().max(), "control: rounding shows"


def test_a_row_is_the_same_in_any_company_and_files_come_back(tmp_path):
    made = quantize(make(), Quant(type="int4", minimum=True))
    if kernels.available():
        prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
        requests = [Request(prompt, SamplingParams(max_tokens=12, ignore_eos=True)) for prompt in prompts]
        together = [done.ids for done in Engine(made).generate(requests)]
        assert together == [Engine(made).generate([request])[0].ids for request in requests]
    save_model(made, tmp_path)
    again = load_model(tmp_path).model
    assert all(torch.equal(tensor, stored_state(made)[name]) for name, tensor in stored_state(again).items())


def test_calibration_rounds_the_rest_and_leaves_experts_to_the_nearest():
    texts = [torch.randint(50, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
    reference, quant = Reference(make(), texts[0], 100), Quant(type="int4")
    plain, calibrated = quantize(make(), quant), quantize(make(), quant, "gptq", texts)
    assert torch.equal(plain.blocks[0].channel.units.down.codes, calibrated.blocks[0].channel.units.down.codes)
    assert not torch.equal(plain.blocks[1].mixer.out.weight.codes, calibrated.blocks[1].mixer.out.weight.codes)
    assert reference.drift(calibrated).kl < 1


def test_experts_that_do_not_divide_stay_and_are_counted():
    made = quantize(make(hidden=24), Quant(type="int8"))
    units = made.blocks[0].channel.units
    assert isinstance(units.gate_up, PackedWeight)
    assert isinstance(units.down, torch.Tensor)
    assert sum(num_plain(module) for module in made.modules()) == 2 * 2, "down, of the experts and of the shared one"
    with torch.no_grad():
        assert made(torch.arange(9)[None]).logits.isfinite().all()


def test_a_token_reads_the_experts_it_is_sent_to():
    few, all_of_them = make(), make(top_k=5)
    unit = 3 * 64 * 32 * 4
    assert bytes_read(all_of_them) - bytes_read(few) == 2 * 3 * unit
