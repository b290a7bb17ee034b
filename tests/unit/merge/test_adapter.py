"""Adapters merged into their bases: the sum computes what the two computed side by side, and 4-bit bases are kept from it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from weft.errors import UserError
from weft.merge.adapter import _four_bits, merge_into_base
from weft.merge.models import Models
from weft.nn import build
from weft.quant import quantize
from weft.spec import Quant, model_spec
from weft.spec.adapters import IA3, LoRA, Prompt
from weft.weights.adapter_files import adapt, write_adapter
from weft.weights.load import load_model, open_checkpoint
from weft.weights.save import save_model

SPEC = {
    "vocab": 50,
    "dim": 64,
    "context": 64,
    "init_std": 0.15,
    "norm": {"type": "rms"},
    "layers": [
        {"repeat": 2, "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 96}}
    ],
}


def trained(folder, settings=None, dtype=torch.float32, quant=None):
    """A base, and an adapter for it that is far from where it began."""
    model = build(model_spec(SPEC), seed=0)
    save_model(model if quant is None else quantize(model, quant), folder / "base", dtype=dtype if quant is None else None)
    loaded = load_model(folder / "base", dtype=torch.float32)
    adapt(loaded.model, settings or LoRA(rank=4), loaded.checkpoint.family, str(folder / "base"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    (folder / "adapter").mkdir()
    write_adapter(loaded.model, folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("settings", [LoRA(rank=4), LoRA(rank=4, dora=True), IA3()], ids=["lora", "dora", "ia3"])
def test_the_sum_computes_what_both_computed(tmp_path, settings):
    adapter = trained(tmp_path, settings)
    made = merge_into_base(adapter, tmp_path / "out")
    assert made.kl < 1e-8 < 1e-3 < made.moved
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        beside = load_model(adapter).model(tokens).logits
        within = load_model(tmp_path / "out").model(tokens).logits
        plain = load_model(tmp_path / "base").model(tokens).logits
    torch.testing.assert_close(within, beside, rtol=0, atol=1e-4)
    assert made.max_logit_change < 1e-4
    assert (plain - beside).abs().max() > 0.1, "control: the adapter does something"
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_rounding_to_the_bases_own_dtype_is_measured(tmp_path):
    adapter = trained(tmp_path, dtype=torch.bfloat16)
    made, wide = merge_into_base(adapter, tmp_path / "out"), merge_into_base(adapter, tmp_path / "wide", dtype=torch.float32)
    assert (made.dtype, wide.dtype) == ("bfloat16", "float32")
    assert load_model(tmp_path / "out").model.dtype == torch.bfloat16
    assert 0 <= wide.kl < 0.1 * made.kl
    assert made.kl < 0.1 * made.moved


def test_another_base_may_be_named_and_a_wrong_one_is_refused(tmp_path):
    adapter = trained(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="which is no path"):
        merge_into_base(adapter, tmp_path / "out")
    merge_into_base(adapter, tmp_path / "out", base=str(tmp_path / "moved"))
    other = save_model(build(model_spec({**SPEC, "dim": 32}), seed=0), tmp_path / "other")
    with pytest.raises(UserError, match="adapter for another model"):
        merge_into_base(adapter, tmp_path / "no", base=str(other))
    with pytest.raises(UserError, match="is a model and no adapter"):
        merge_into_base(tmp_path / "moved", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("quant", [Quant(type="nf4", double=True), Quant(type="int4")], ids=["nf4", "int4"])
def test_a_base_in_4_bits_is_refused_unless_it_is_forced(tmp_path, quant):
    adapter = trained(tmp_path, quant=quant)
    with pytest.raises(UserError, match=f"is stored in {quant.type}, 4 bits a weight, which cannot hold the sum.*--force"):
        merge_into_base(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = merge_into_base(adapter, tmp_path / "out", force=True)
    assert made.kl < 1e-8
    assert open_checkpoint(tmp_path / "out").spec.quant is None
    assert made.moved > 1e-3


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (("F32", "Q2_K", "Q3_K"), "Q2_K, Q3_K, at most 4 bits a weight"),
        (("IQ4_XS", "Q6_K"), "IQ4_XS, at most 4 bits a weight"),
        (("F32", "Q5_K", "Q6_K"), None),
    ],
)
def test_files_of_other_kinds_are_known_by_the_types_in_them(kinds, told):
    file = SimpleNamespace(tensors={kind: SimpleNamespace(type=kind) for kind in kinds})
    assert _four_bits(SimpleNamespace(quant=None, files=SimpleNamespace(file=file))) == told


def test_adapters_are_not_averaged(tmp_path):
    adapter = trained(tmp_path)
    with pytest.raises(UserError, match="is an adapter, whose factors mean nothing apart"):
        Models([adapter, adapter])


def test_a_base_in_8_bits_is_written_out(tmp_path):
    made = merge_into_base(trained(tmp_path, quant=Quant(type="int8")), tmp_path / "out")
    assert made.kl < 1e-8
    assert made.dtype == "float32"


def test_what_is_no_change_of_weights_is_refused(tmp_path):
    adapter = trained(tmp_path, Prompt(tokens=3))
    with pytest.raises(UserError, match="prompt cannot be merged"):
        merge_into_base(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verb_prints_what_it_changed(tmp_path):
    adapter = trained(tmp_path)
    arguments = [sys.executable, "-m", "weft.cli.main", "merge", "adapter", str(adapter), "-o", str(tmp_path / "out"), "--json"]
    run = subprocess.run(arguments, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["kl"] < 1e-8
    assert "logits within" in run.stderr
