"""What DeepSeek's checkpoints hold beside the model itself: modules for multi-token prediction, and weights of 8 bits in blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import deepseek, tokens
from safetensors.torch import load_file

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
