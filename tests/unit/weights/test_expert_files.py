"""Files of a mixture of experts: a tensor an expert, or all of them in one; complete, or refused by name."""

import pytest
import torch

from weft.errors import UserError
from weft.nn import build
from weft.spec import model_spec
from weft.weights.files import TensorFiles, write_safetensors
from weft.weights.load import load_model
from weft.weights.map import stored_state
from weft.weights.save import save_model

MIXER = {"type": "attention", "heads": 2, "rope": {}}
MIXTRAL = {"type": "experts", "experts": 3, "top_k": 2, "hidden": 12}


def saved(folder, dtype=torch.float32, **changes):
    layers = [{"repeat": 2, "mixer": MIXER, "channel": {**MIXTRAL, **changes}}]
    sizes = {"vocab": 31, "dim": 16, "context": 64, "norm": {"type": "rms"}, "tie_embeddings": False}
    model = build(model_spec({**sizes, "layers": layers}), seed=3, dtype=dtype)
    save_model(model, folder)
    return model, {name: TensorFiles(folder).read(name) for name in TensorFiles(folder).names}


def rewritten(folder, tensors):
    (folder / "model.safetensors").unlink()
    write_safetensors(folder, tensors.items())
    return folder


def equal(ours, theirs):
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()) and list(ours) == list(theirs)


def test_files_have_a_tensor_an_expert(tmp_path):
    model, tensors = saved(tmp_path)
    units = model.blocks[1].channel.units
    assert torch.equal(tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"], units.gate_up[2, :12])
    assert torch.equal(tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"], units.gate_up[2, 12:])
    assert torch.equal(tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"], units.down[2])
    assert not any("gate_up" in name for name in tensors)
    assert equal(stored_state(load_model(tmp_path).model), stored_state(model))


def test_stacked_experts_are_read_too(tmp_path):
    model, tensors = saved(tmp_path)
    stacked = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    for i in (0, 1):
        channel = model.blocks[i].channel
        stacked[f"model.layers.{i}.mlp.gate.weight"] = channel.router.weight.detach()
        stacked[f"model.layers.{i}.mlp.experts.gate_up_proj"] = channel.units.gate_up.detach()
        stacked[f"model.layers.{i}.mlp.experts.down_proj"] = channel.units.down.detach()
    rewritten(tmp_path, stacked)
    assert equal(stored_state(load_model(tmp_path).model), stored_state(model))
    stacked["model.layers.1.mlp.experts.down_proj"] = stacked["model.layers.1.mlp.experts.down_proj"][:2].clone()
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.down_proj is 2x16x12, but .* needs 3x16x12"):
        load_model(rewritten(tmp_path, stacked))


def test_incomplete_experts_are_refused_by_name(tmp_path):
    _, tensors = saved(tmp_path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(UserError, match=r"lacks a tensor the model needs: model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight\."):
        load_model(rewritten(tmp_path, tensors))


def test_an_expert_too_many_is_refused_by_name(tmp_path):
    _, tensors = saved(tmp_path)
    tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"] = torch.zeros(16, 12)
    with pytest.raises(UserError, match=r"has no place for: model\.layers\.0\.block_sparse_moe\.experts\.3\.w2\.weight"):
        load_model(rewritten(tmp_path, tensors))


def test_a_family_of_ours_keeps_the_choice_bias_as_it_is(tmp_path):
    """No family of transformers routes by sigmoid without latent attention: the spec lies in config.json, the bias beside the weights."""
    spec = {"score": "sigmoid", "choice_bias": True, "balance_loss": 0.25}
    model, _ = saved(tmp_path, torch.bfloat16, **spec)
    for block in model.blocks:
        block.channel.router.choice_bias.copy_(torch.linspace(-0.1, 0.1, 3))
    save_model(model, tmp_path)
    again = load_model(tmp_path).model
    assert again.spec == model.spec
    assert again.blocks[0].channel.router.choice_bias.dtype == torch.float32
    assert equal(stored_state(again), stored_state(model))
