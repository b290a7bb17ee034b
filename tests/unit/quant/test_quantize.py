"""Whole models in fewer bits: what rounding costs, that calibration helps, and that files come back."""

import json
import math
import subprocess
import sys

import pytest
import torch

from weft.engine import Engine, Request, SamplingParams
from weft.engine.mtp_draft import MTPDrafter
from weft.engine.speculation import FixedLength, Speculation
from weft.nn import build
from weft.nn.linear import packed_weight
from weft.nn.packed import PackedWeight
from weft.quant import Reference, dequantize, quantize
from weft.quant.gptq import round_with_compensation
from weft.quant.rounding import round_to_nearest
from weft.spec import Quant, model_spec
from weft.weights.load import load_model
from weft.weights.save import save_model

LLAMA = {
    "repeat": 2,
    "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}},
    "channel": {"type": "gated", "hidden": 96},
}
SPEC = {"vocab": 50, "dim": 64, "context": 128, "init_std": 0.15, "norm": {"type": "rms"}, "layers": [LLAMA]}
HYBRID = {**SPEC, "layers": [*SPEC["layers"], {"mixer": {"type": "mamba", "state_dim": 4}}, {"mixer": {"type": "lstm"}}]}


def error(weight, codes, quant, inputs):
    packed = packed_weight(*weight.shape, quant).fill(*codes)
    return ((packed.dequantise() - weight) @ inputs.T).square().mean().item()


FORMS = [Quant(type="int8"), Quant(type="int4"), Quant(type="int4", minimum=True), Quant(type="nf4"), Quant(type="nf4", double=True)]


@pytest.mark.parametrize("quant", FORMS)
def test_compensation_beats_rounding_on_inputs_that_hang_together(quant):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    causes, mixing, noise = (torch.randn(*shape, generator=generator) for shape in ((400, 12), (12, 64), (400, 64)))
    inputs = causes @ mixing + 0.1 * noise
    nearest = error(weight, round_to_nearest(weight, quant), quant, inputs)
    compensated = error(weight, round_with_compensation(weight, inputs.T @ inputs, quant), quant, inputs)
    assert compensated < 0.6 * nearest
    useless = error(weight, round_with_compensation(weight, torch.eye(64), quant), quant, inputs)
    assert useless > compensated * 1.3, "control: with inputs that do not hang together there is nothing to gain"


def test_rounding_is_within_half_a_step():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    codes = round_to_nearest(weight, Quant(type="int8"))
    back = packed_weight(8, 64, Quant(type="int8")).fill(*codes).dequantise()
    step = weight.view(8, 2, 32).abs().amax(-1, keepdim=True) / 127
    assert ((back - weight).view(8, 2, 32).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("quant", [Quant(type="int8"), Quant(type="int4", minimum=True)])
def test_modules_for_multi_token_prediction_are_rounded_and_draft(quant):
    model = build(model_spec({**SPEC, "mtp": {"depth": 2}}), seed=4).eval()
    made = quantize(model, quant)
    matrix = made.mtp[1].eh_proj.weight
    assert isinstance(matrix, PackedWeight)
    assert matrix.kind == quant.type
    right = packed_weight(64, 128, quant).fill(*round_to_nearest(model.mtp[1].eh_proj.weight, quant))
    assert torch.equal(matrix.dequantise(), right.dequantise())
    request = Request([3, 1, 4, 1, 5], SamplingParams(max_tokens=40))
    engine = Engine(made, draft=Speculation(MTPDrafter(made), FixedLength(2)))
    assert engine.generate([request])[0].ids == Engine(made).generate([request])[0].ids
    assert engine.stats.drafted_tokens > 40


@pytest.mark.parametrize("spec", [SPEC, HYBRID])
def test_fewer_bits_drift_further_and_the_file_comes_back(tmp_path, spec):
    model = build(model_spec(spec), seed=4).eval()
    ids = torch.randint(50, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    reference = Reference(model, ids, 200)
    assert reference.drift(model).kl == pytest.approx(0, abs=1e-9)
    drifts = {}
    for kind in ("int8", "int4"):
        made = quantize(model, Quant(type=kind, minimum=kind == "int4"))
        drifts[kind] = reference.drift(made)
        save_model(made, tmp_path / kind)
        loaded = load_model(tmp_path / kind)
        assert loaded.spec.quant is not None
        assert loaded.spec.quant.type == kind
        tokens = torch.tensor([ids])
        with torch.no_grad():
            assert torch.equal(loaded.model(tokens).logits, made(tokens).logits)
    assert 0 < drifts["int8"].kl < 0.2 * drifts["int4"].kl
    assert drifts["int4"].kl < 1
    assert math.isfinite(drifts["int4"].bits_per_byte)


def weft(*arguments):
    return subprocess.run([sys.executable, "-m", "weft.cli.main", *map(str, arguments)], capture_output=True, text=True)


def test_bad_requests_get_a_sentence(tmp_path):
    save_model(build(model_spec(SPEC), seed=4), tmp_path / "model")
    out = tmp_path / "out"
    for arguments, words in (
        ((tmp_path / "model", "--to", "int3"), "int3"),
        ((tmp_path / "model", "--to", "int8", "--method", "awq"), "awq"),
        ((tmp_path / "nowhere", "--to", "int8"), "nowhere"),
        ((tmp_path / "model", "--to", "int4", "--double"), "only nf4"),
    ):
        run = weft("quantize", *arguments, "-o", out)
        assert run.returncode == 2
        assert words in run.stderr
        assert "Traceback" not in run.stderr
        assert not out.exists()


def test_a_quantised_model_is_not_exported(tmp_path):
    model = quantize(build(model_spec(SPEC), seed=4).eval(), Quant(type="int8"))
    save_model(model, tmp_path / "small")
    run = weft("export", tmp_path / "small", "--to", "hf", "-o", tmp_path / "out")
    assert run.returncode == 2
    assert "quantised to int8" in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_spec_says_how_many_bits_it_stores():
    assert Quant(type="int8").bits() == 8.5
    assert Quant(type="int4", minimum=True).bits() == 5
    assert json.loads(model_spec({**SPEC, "quant": {"type": "nf4"}}).to_json())["quant"]["type"] == "nf4"


def test_dequantised_is_what_the_packed_model_computes():
    made = quantize(build(model_spec(SPEC), seed=4).eval(), Quant(type="int4"))
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        got, want = made(tokens).logits, dequantize(made)(tokens).logits
        assert (got - want).abs().max() < 3e-4 * want.abs().max()
