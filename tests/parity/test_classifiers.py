"""Classifiers and reward models against transformers' *ForSequenceClassification through the real files, both ways, in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import decoder, deepseek, gemma3, gpt, gpt_neo, mamba
from safetensors.torch import load_file

from weft.errors import UserError
from weft.nn import Model, add_score, build
from weft.spec import ModelSpec
from weft.weights.load import load_model
from weft.weights.save import save_model
from weft.zoo import llama_gguf
from weft.zoo.family import canonical

TOLERANCE = 3e-5
PAD = 60
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
CONFIGS = {
    "OpenAIGPT": gpt("OpenAIGPT"),
    "GPT2": gpt("GPT2"),
    "GPTNeo": gpt_neo(),
    "Llama": decoder("Llama", tie_word_embeddings=True),
    "Mistral": decoder("Mistral", sliding_window=5),
    "Mixtral": decoder("Mixtral", intermediate_size=76, num_local_experts=5, num_experts_per_tok=2, rms_norm_eps=1e-6),
    "Qwen2": decoder("Qwen2"),
    "Qwen3": decoder("Qwen3", head_dim=10, tie_word_embeddings=True),
    "Qwen3Moe": decoder("Qwen3Moe", head_dim=10, **MOE),
    "Gemma2": decoder("Gemma2", head_dim=10, query_pre_attn_scalar=13, sliding_window=5, num_hidden_layers=4),
    "Gemma3Text": gemma3(),
    "DeepseekV3": deepseek("DeepseekV3", n_group=1, topk_group=1),
}


def classifier(kind: str, outputs: int, names: dict[int, str] | None = None) -> Any:
    """A tiny random classifier of transformers, its scores far from zero."""
    config = CONFIGS[kind]()
    config.pad_token_id = PAD
    config.num_labels = outputs
    if names is not None:
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}ForSequenceClassification")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of 23, 9 and 1 tokens, padded on the right, and their lengths."""
    lengths = torch.tensor([23, 9, 1])
    ids = torch.randint(PAD, (3, 23), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(torch.arange(23) >= lengths[:, None], PAD), lengths


@torch.no_grad()
def ours(model: Model, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    assert model.score is not None
    return model.score(model(ids).hidden[torch.arange(len(ids)), lengths - 1])


@torch.no_grad()
def theirs(model: Any, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return model(ids, attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long()).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_ways(kind: str, tmp_path: Path) -> None:
    """Read theirs, write ours, let theirs read it: the same scores, tensors bit for bit."""
    original, texts = classifier(kind, 3), rows()
    original.save_pretrained(tmp_path / "theirs")
    expected = theirs(original, *texts)
    assert expected.std() > 0.1
    loaded = load_model(tmp_path / "theirs")
    assert loaded.spec.score == 3
    assert loaded.spec.labels == ()
    assert (ours(loaded.model, *texts) - expected).abs().max() < TOLERANCE
    # Negative controls: the head, and the token it reads.
    wrong = ours(loaded.model, texts[0], texts[1].clamp(min=2) - 1)
    assert (wrong - expected).abs().max() > 100 * TOLERANCE
    with torch.no_grad():
        loaded.model.score.weight.mul_(1.01)
        assert (ours(loaded.model, *texts) - expected).abs().max() > TOLERANCE
    loaded = load_model(tmp_path / "theirs")

    save_model(loaded.model, tmp_path / "ours", family=loaded.checkpoint.family)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == [f"{kind}ForSequenceClassification"]
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**written, "pad_token_id": PAD}))
    again, report = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert torch.equal(theirs(again.eval(), *texts), expected)
    first, second = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_untied_head_stays_beside_the_score_head(tmp_path: Path) -> None:
    """A language model that became a classifier keeps both heads; transformers reads past the one it does not know."""
    torch.manual_seed(0)
    language = hf.LlamaForCausalLM(decoder("Llama")())
    language.save_pretrained(tmp_path / "language")
    model = add_score(load_model(tmp_path / "language").model, 2, seed=3, labels=("bad", "good"))
    ids, lengths = rows()
    save_model(model, tmp_path / "both")
    again = load_model(tmp_path / "both")
    assert canonical(again.spec) == canonical(model.spec)
    assert torch.equal(ours(again.model, ids, lengths), ours(model, ids, lengths))
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    (tmp_path / "both" / "config.json").write_text(json.dumps({**config, "pad_token_id": PAD}))
    reader = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "both", attn_implementation="eager").eval()
    assert reader.config.id2label == {0: "bad", 1: "good"}
    assert (theirs(reader, ids, lengths) - ours(model, ids, lengths)).abs().max() < TOLERANCE


def test_a_reward_model_has_one_output(tmp_path: Path) -> None:
    original = classifier("Llama", 1)
    original.save_pretrained(tmp_path)
    assert load_model(tmp_path).spec.score == 1


def test_names_of_classes_travel(tmp_path: Path) -> None:
    names = {0: "sad", 1: "neither", 2: "glad"}
    classifier("Llama", 3, names).save_pretrained(tmp_path)
    assert load_model(tmp_path).spec.labels == ("sad", "neither", "glad")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "sad", "2": "glad"}}))
    with pytest.raises(UserError, match="id2label"):
        load_model(tmp_path)


def test_what_no_family_holds_is_saved_as_our_own(tmp_path: Path) -> None:
    """Mamba has no classifier in transformers."""
    torch.manual_seed(0)
    hf.MambaForCausalLM(mamba()()).save_pretrained(tmp_path / "mamba")
    model = add_score(load_model(tmp_path / "mamba").model, 2, seed=0)
    save_model(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "weft"
    again, texts = load_model(tmp_path / "ours"), rows()
    assert torch.equal(ours(again.model, *texts), ours(model, *texts))


def test_gguf_has_no_place_for_a_score_head(tmp_path: Path) -> None:
    classifier("Llama", 2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no place for its score head; export it with --to hf"):
        llama_gguf.to_gguf(load_model(tmp_path).spec)


def test_a_score_head_is_drawn_by_its_seed_and_counted() -> None:
    layers = [{"mixer": {"type": "attention", "heads": 2}, "channel": {"type": "gated", "hidden": 24}}]
    spec = ModelSpec.model_validate({"vocab": 11, "dim": 16, "layers": layers})
    first, second, other = (add_score(build(spec, seed=1), 4, seed) for seed in (5, 5, 6))
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.spec.num_params() == sum(p.numel() for p in first.parameters()) == spec.num_params() + 64
    with pytest.raises(ValueError, match="labels names 1 outputs but score is 4"):
        add_score(first, 4, 0, labels=("alone",))
