"""Every family against transformers through the real files, both ways, in fp32: logits within 3e-5, tensors bit for bit."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from hf_cases import CASES, Case, logits_of, oracle, tokens
from safetensors.torch import load_file

from weft.nn import Arena, Model
from weft.weights.load import load_model
from weft.weights.save import save_model
from weft.zoo import family_of

TOLERANCE = 3e-5


def ours(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def incremental(model: Model, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits of the same tokens fed in chunks through an arena."""
    arena = Arena(model, rows=ids.shape[0], max_len=ids.shape[1], max_chunk=max(chunks))
    pieces = []
    with torch.no_grad():
        for piece in ids.split(chunks, dim=1):
            n_new = torch.full((ids.shape[0],), piece.shape[1])
            output = model(piece, arena.step(n_new, piece.shape[1], keep="last"), arena.views())
            pieces.append(output.logits)
            arena.commit(output.pending, n_new)
    return torch.cat(pieces, 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ways(case: Case, tmp_path: Path) -> None:
    theirs, ids = oracle(case), tokens()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(theirs, ids)
    assert expected.std() > 0.3

    loaded = load_model(tmp_path / "theirs")
    assert loaded.checkpoint.family.name == case.family
    assert family_of(loaded.spec).name == case.family
    assert difference(ours(loaded.model, ids), expected) < TOLERANCE
    assert loaded.spec.num_params() == sum(p.numel() for p in theirs.parameters())

    assert difference(incremental(loaded.model, ids, [1, 9, 1, 1, 12, 7]), expected) < TOLERANCE

    save_model(loaded.model, tmp_path / "ours")
    again, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(again) is type(theirs)
    assert difference(logits_of(again.eval(), ids), expected) == 0

    first, second = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_comparison_notices_a_wrong_weight(case: Case, tmp_path: Path) -> None:
    """Control: any one tensor out of place must show in the logits."""
    theirs, ids = oracle(case), tokens()
    theirs.save_pretrained(tmp_path)
    expected = logits_of(theirs, ids)
    model = load_model(tmp_path).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before = parameter.clone()
            parameter.mul_(1.01).add_(0.02)  # not 0.01: a gain of 1 + w would merely be scaled, which a later norm undoes
            assert difference(ours(model, ids), expected) > TOLERANCE, name
            parameter.copy_(before)
    assert difference(ours(model, ids), expected) < TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if "llama" in case.name or "mistral" in case.name], ids=str)
def test_the_comparison_notices_a_wrong_rotation_or_window(case: Case, tmp_path: Path) -> None:
    theirs, ids = oracle(case), tokens()
    theirs.save_pretrained(tmp_path)
    expected = logits_of(theirs, ids)
    config = json.loads((tmp_path / "config.json").read_text())
    changes = [{"rope_parameters": {**config["rope_parameters"], "rope_theta": config["rope_parameters"]["rope_theta"] * 1.01}}]
    if config.get("sliding_window"):
        changes.append({"sliding_window": config["sliding_window"] + 1})
    if config["rope_parameters"]["rope_type"] != "default":
        changes.append({"rope_parameters": {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}})
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        assert difference(ours(load_model(tmp_path).model, ids), expected) > TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma3", {"sliding_window": 6}),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 51.0}}}),
        ("gemma3", {"rope_parameters": {"full_attention": {"factor": 3.1}}}),
        ("gpt-neo", {"window_size": 6}),
        ("gpt-neo", {"attention_types": [[["local", "global"], 2]], "attention_layers": ["local", "global"] * 2}),
    ],
    ids=str,
)
def test_the_comparison_notices_a_wrong_kind_of_layer(name: str, change: dict, tmp_path: Path) -> None:
    theirs, ids = oracle(next(case for case in CASES if case.name == name)), tokens()
    theirs.save_pretrained(tmp_path)
    expected = logits_of(theirs, ids)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        if isinstance(value, dict):
            value = {**config[key], **{kind: {**config[key][kind], **given} for kind, given in value.items()}}
        config[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(ours(load_model(tmp_path).model, ids), expected) > TOLERANCE
