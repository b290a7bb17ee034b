"""The forms in which the same weights are found on disk: sharded, bfloat16, base models, older names, damaged or foreign ones."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import CASES, Case, logits_of, oracle, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.errors import UserError
from weft.spec import model_spec
from weft.weights.export import export
from weft.weights.load import load_model
from weft.weights.save import check_replaceable, save_model

TOLERANCE = 3e-5
BY_NAME = {case.name: case for case in CASES}
WEIGHTS = "model.safetensors"


def ours(folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=dtype).model(tokens()).logits


def saved(name: str, folder: Path) -> Tensor:
    """A model of transformers on disk, and its logits."""
    model = oracle(BY_NAME[name])
    model.save_pretrained(folder)
    return logits_of(model, tokens())


def edit(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a saved model."""
    tensors = {**load_file(folder / WEIGHTS), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS, metadata={"format": "pt"})


def rename(folder: Path, old: str, new: str) -> None:
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_sharded_both_ways(tmp_path: Path) -> None:
    model = oracle(BY_NAME["qwen2"])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    expected = logits_of(model, tokens())
    loaded = load_model(tmp_path / "theirs")
    with torch.no_grad():
        assert (loaded.model(tokens()).logits - expected).abs().max() < TOLERANCE
    save_model(loaded.model, tmp_path / "ours", max_shard_bytes=60_000)
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert torch.equal(logits_of(again, tokens()), expected)
    shards[0].unlink()
    with pytest.raises(UserError, match="lacks"):
        load_model(tmp_path / "ours")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba"])
def test_bfloat16_checkpoints(name: str, tmp_path: Path) -> None:
    """Weights are read as stored; in float32 the logits are those of transformers on the same rounded weights."""
    oracle(BY_NAME[name]).bfloat16().save_pretrained(tmp_path / "theirs")
    wide = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32, attn_implementation="eager")
    expected = logits_of(wide.eval(), tokens())
    assert (ours(tmp_path / "theirs", torch.float32) - expected).abs().max() < TOLERANCE
    loaded = load_model(tmp_path / "theirs")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        rounded = loaded.model(tokens()).logits.float()
    assert TOLERANCE < (rounded - expected).abs().max() < 0.1 * expected.abs().max()
    save_model(loaded.model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["torch_dtype"] == "bfloat16"
    first, second = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16


def test_saving_in_another_dtype_rounds_once(tmp_path: Path) -> None:
    saved("llama", tmp_path / "a")
    save_model(load_model(tmp_path / "a").model, tmp_path / "b", dtype=torch.bfloat16)
    first, second = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert all(torch.equal(first[key].bfloat16(), second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "base"), [("llama-tied", hf.LlamaModel), ("gpt2", hf.GPT2Model), ("gpt1", hf.OpenAIGPTModel), ("mamba", hf.MambaModel)]
)
def test_a_base_model_without_its_tied_head_loads(name: str, base: type, tmp_path: Path) -> None:
    expected = saved(name, tmp_path / "whole")
    base.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    prefix = load_model(tmp_path / "whole").checkpoint.family.prefix
    assert not any(key.startswith(prefix) for key in load_file(tmp_path / "base" / WEIGHTS))
    assert (ours(tmp_path / "base") - expected).abs().max() < TOLERANCE


def test_a_base_model_that_needs_its_head_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "whole")
    hf.LlamaModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"lacks a tensor the model needs: lm_head\.weight"):
        load_model(tmp_path / "base")


def test_tensors_that_older_versions_wrote(tmp_path: Path) -> None:
    """Masks and rotary tables are read past; a tied head under its own name must be equal; an old name still counts."""
    expected = saved("gpt2", tmp_path / "gpt2")
    mask = torch.ones(40, 40).tril().bool().view(1, 1, 40, 40)
    head = load_file(tmp_path / "gpt2" / WEIGHTS)["transformer.wte.weight"].clone()
    edit(
        tmp_path / "gpt2",
        {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": head},
    )
    assert (ours(tmp_path / "gpt2") - expected).abs().max() < TOLERANCE

    expected = saved("llama", tmp_path / "llama")
    edit(tmp_path / "llama", {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert (ours(tmp_path / "llama") - expected).abs().max() < TOLERANCE

    expected = saved("mamba", tmp_path / "mamba")
    rename(tmp_path / "mamba", "backbone.embeddings.", "backbone.embedding.")
    assert (ours(tmp_path / "mamba") - expected).abs().max() < TOLERANCE


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    saved("llama-tied", tmp_path)
    head = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1e-6
    edit(tmp_path, {"lm_head.weight": head})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(tmp_path)
    edit(tmp_path, {"lm_head.weight": head[:-1].clone()})
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.1.self_attn.k_proj.weight": None}, ["lacks a tensor", "model.layers.1.self_attn.k_proj.weight"]),
        ({"model.norm.weight": None, "model.layers.0.mlp.up_proj.weight": None}, ["lacks 2 tensors", "model.norm.weight", "up_proj"]),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(2)}, ["no place for", "model.layers.3.mlp.up_proj.weight"]),
        ({"model.layers.0.self_attn.q_norm.weight": torch.zeros(8)}, ["no place for", "q_norm"]),
        ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(48, 47)}, ["q_proj.weight is 48x47", "blocks.0.mixer.qkv.weight", "48x48"]),
        ({"lm_head.weight": torch.zeros(60, 48)}, ["lm_head.weight is 60x48", "head.weight", "61x48"]),
    ],
    ids=["missing", "two missing", "extra layer", "extra norm", "shape", "vocabulary"],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], words: list[str], tmp_path: Path) -> None:
    saved("llama", tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_loading_leaves_nothing_unfilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is poisoned before the weights are read: a tensor that no row filled would stay NaN."""
    from weft.weights import load, map

    expected = saved("gemma2", tmp_path)
    real = map.load_tensors

    def poisoned(tensors: Mapping[str, torch.Tensor], *rest: Any) -> None:
        for tensor in tensors.values():
            tensor.fill_(math.nan)
        real(tensors, *rest)

    monkeypatch.setattr(load, "load_tensors", poisoned)
    assert (ours(tmp_path) - expected).abs().max() < TOLERANCE
    monkeypatch.setattr(load, "load_tensors", lambda tensors, *rest: poisoned(tensors, rest[0][1:], *rest[1:]))
    with pytest.raises((UserError, AssertionError)):
        ours(tmp_path)


def test_a_hybrid_round_trips_in_wefts_own_folder(tmp_path: Path) -> None:
    from weft.nn import build

    attention = {"type": "attention", "heads": 2, "rope": {}, "window": 3}
    layers = [
        {"mixer": attention, "channel": {"type": "gated", "hidden": 9}},
        {"mixer": {"type": "lstm", "hidden": 7}, "topology": "sandwich"},
        {"mixer": {"type": "mamba", "state_dim": 3}, "channel": {"type": "rwkv_channel_mix", "hidden": 5}},
        {"mixer": {"type": "gru"}, "channel": {"type": "mlp", "hidden": 5}, "topology": "parallel"},
    ]
    spec = model_spec({"vocab": 61, "dim": 12, "context": 32, "layers": layers, "position": {"type": "learned", "length": 32}})
    model = build(spec, seed=3).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.spec == spec
    assert loaded.checkpoint.family.name == "weft"
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens()).logits, model(tokens()).logits)
    with pytest.raises(UserError, match="no Hugging Face family"):
        export(tmp_path / "m", "hf", tmp_path / "hf")
    with pytest.raises(UserError, match="Llama family"):
        export(tmp_path / "m", "gguf", tmp_path / "m.gguf")


def test_a_pickled_state_dict_loads_through_torchs_weights_only_reader(tmp_path: Path) -> None:
    model = oracle(BY_NAME["gpt2"])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert (ours(tmp_path) - logits_of(model, tokens())).abs().max() < TOLERANCE


def test_saving_replaces_a_model_but_nothing_else(tmp_path: Path) -> None:
    saved("llama", tmp_path / "a")
    model = load_model(tmp_path / "a").model
    save_model(model, tmp_path / "b", max_shard_bytes=60_000)
    save_model(model, tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", WEIGHTS]
    (tmp_path / "b/thesis.docx").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.docx"):
        save_model(model, tmp_path / "b")
    assert (tmp_path / "b/thesis.docx").read_text() == "years of work"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("x")
    with pytest.raises(UserError, match=r"todo\.txt"):
        check_replaceable(tmp_path / "notes")
    with pytest.raises(UserError, match="is a file"):
        save_model(model, tmp_path / "a/config.json")


@pytest.mark.parametrize("case", [BY_NAME["llama"]], ids=str)
def test_folders_that_are_no_models(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_model(tmp_path)
    oracle(case).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(tmp_path)
