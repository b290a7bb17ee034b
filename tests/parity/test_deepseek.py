"""What DeepSeek's checkpoints hold beside the model itself: modules for multi-token prediction, and weights of 8 bits in blocks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import deepseek, tokens
from safetensors.torch import load_file, save_file

from weft.errors import UserError
from weft.nn import Model, build
from weft.spec import MTP, ModelSpec
from weft.weights.load import load_model
from weft.weights.save import save_model
from weft.zoo import from_config

TOLERANCE = 3e-5
LAYERS = 3


def v3(depth: int, **changes: Any) -> Model:
    """A small DeepSeek-V3 with modules for multi-token prediction, every weight random and of a size that shows."""
    config = deepseek("DeepseekV3", q_lora_rank=15, n_group=4, topk_group=2, **changes)().to_dict()
    spec = from_config({**config, "num_nextn_predict_layers": depth})[1]
    model = build(spec, seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.copy_(1 + 0.3 * random if "norm" in name else random * 1.3 * parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("depth", [1, 2])
def test_modules_for_multi_token_prediction_go_both_ways(depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_layers import MtpModel

    model, ids = v3(depth), tokens()
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for layer in range(LAYERS, LAYERS + depth):
        assert torch.equal(stored[f"model.layers.{layer}.embed_tokens.weight"], stored["model.embed_tokens.weight"])
        assert torch.equal(stored[f"model.layers.{layer}.shared_head.head.weight"], stored["lm_head.weight"])
    again = load_model(tmp_path)
    assert again.spec == ModelSpec.model_validate({**model.spec.model_dump(), "mtp": MTP(depth=depth)})
    assert again.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.model.state_dict().items())

    monkeypatch.setattr(
        hf.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{LAYERS}.*", rf"model\.layers\.{LAYERS + 1}.*"]
    )
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    modules = MtpModel.from_pretrained(theirs).eval()
    with torch.no_grad():
        output = again.model(ids, ahead=True)
        hidden = theirs.model(ids, use_cache=False).last_hidden_state
        assert (output.hidden - hidden).abs().max() < TOLERANCE
        for k in range(1, depth + 1):
            further, positions = ids[:, k:], torch.arange(k, ids.shape[1])[None]
            hidden = modules.forward_layer(k - 1, hidden[:, :-1], positions, None, input_ids=further)
            assert hidden.std() > 0.3
            assert (output.aux[f"mtp.{k}"][:, :-k] - hidden).abs().max() < TOLERANCE


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    """Change a saved folder: its tensors, and keys of its config.json."""
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_files_may_lack_the_modules_their_config_promises_but_not_some_of_them(tmp_path: Path) -> None:
    model = v3(2)
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, {name: tensor for name, tensor in stored.items() if f"layers.{LAYERS + 1}." not in name})
    with pytest.raises(UserError, match=rf"model\.layers\.{LAYERS + 1}\.enorm\.weight"):
        load_model(tmp_path)
    rewrite(
        tmp_path,
        {name: tensor for name, tensor in stored.items() if f"layers.{LAYERS}." not in name and f"layers.{LAYERS + 1}." not in name},
    )
    plain = load_model(tmp_path)
    assert plain.spec.mtp is None
    with torch.no_grad():
        assert torch.equal(plain.model(tokens()).logits, model(tokens()).logits)


def test_a_file_may_hold_a_module_that_is_not_asked_for(tmp_path: Path) -> None:
    save_model(v3(1), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, stored, num_nextn_predict_layers=0)
    assert load_model(tmp_path).spec.mtp is None
    stored[f"model.layers.{LAYERS}.shared_head.head.weight"][0] += 1
    rewrite(tmp_path, stored, num_nextn_predict_layers=1)
    with pytest.raises(UserError, match=r"shared_head\.head\.weight differs from lm_head\.weight, but a model shares both"):
        load_model(tmp_path)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    save_model(v3(1), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.2.mlp.experts.5.up_proj.weight"]
    rewrite(tmp_path, stored)
    with pytest.raises(UserError, match=r"lacks a tensor the model needs: model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight"):
        load_model(tmp_path)


def test_the_bias_of_the_choice_keeps_its_digits_in_16_bits(tmp_path: Path) -> None:
    model = v3(0)
    bias = model.blocks[1].channel.router.choice_bias
    bias.copy_(0.7 + 1e-3 * torch.arange(8))
    save_model(model.bfloat16(), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    again = load_model(tmp_path).model
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.blocks[1].channel.router.choice_bias, 0.7 + 1e-3 * torch.arange(8))
    assert torch.equal(again.float().blocks[1].channel.router.choice_bias, 0.7 + 1e-3 * torch.arange(8))


BLOCK = (16, 12)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of 8-bit floats, a factor a block, and what the two stand for, block by block."""
    rows, columns = BLOCK
    codes, exact = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    factors = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            factors[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / factors[i, j]).to(torch.float8_e4m3fn)
            exact[place] = codes[place].float() * factors[i, j]
    return codes, factors, exact


def test_matrices_of_8_bit_floats_are_read_with_their_factors(tmp_path: Path) -> None:
    save_model(v3(1), tmp_path / "plain")
    save_model(v3(1), tmp_path / "coded")
    exact = load_file(tmp_path / "plain/model.safetensors")
    coded: dict[str, torch.Tensor] = {}
    for name, tensor in list(exact.items()):
        if name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight"):
            coded[name], coded[f"{name}_scale_inv"], exact[name] = in_blocks(tensor)
        else:
            coded[name] = tensor
    rewrite(tmp_path / "plain", exact)
    rewrite(tmp_path / "coded", coded, quantization_config=FP8)
    want, got = (load_model(tmp_path / name, dtype=torch.float32).model for name in ("plain", "coded"))
    assert all(torch.equal(tensor, want.state_dict()[name]) for name, tensor in got.state_dict().items())
    assert load_model(tmp_path / "coded").model.dtype == torch.bfloat16, "the dtype of the largest matrix, which is coded"
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    rewrite(tmp_path / "coded", {key: tensor for key, tensor in coded.items() if key != f"{name}_scale_inv"})
    with pytest.raises(UserError, match=r"kv_b_proj\.weight is a matrix of 8-bit floats and needs factors"):
        load_model(tmp_path / "coded")
    rewrite(tmp_path / "coded", coded, quantization_config={**FP8, "weight_block_size": [16, 16]})
    with pytest.raises(UserError, match="blocks of 16x16, which are missing or of another shape"):
        load_model(tmp_path / "coded")
    rewrite(tmp_path / "coded", coded, quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match=r"quantization_config is .*awq.*fp8 with weight_block_size"):
        load_model(tmp_path / "coded")
