"""Recipes with an adapter: what they train and save, that they go on bit for bit, and what they refuse."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from system.train_runs import MODEL, RECIPE, make_inputs
from weft.cli.main import app
from weft.engine import Request, SamplingParams
from weft.engine.open import open_engine
from weft.errors import UserError
from weft.nn.adapters import adapters_off, has_adapter
from weft.quant.model import quantize
from weft.spec import Quant
from weft.tokenizer import load_tokenizer
from weft.train.assemble import open_job, run_recipe
from weft.train.callbacks import Callback
from weft.train.matrices import trained_weights
from weft.train.parallel import World
from weft.train.plan import make_plan
from weft.train.recipe import override, recipe
from weft.weights.adapter_files import put_adapters, read_adapter
from weft.weights.load import load_model
from weft.weights.save import save_model
from weft.zoo import FAMILIES

FORMS = {
    "lora": {"type": "lora", "rank": 3, "dropout": 0.2},
    "dora": {"type": "lora", "rank": 2, "dora": True, "targets": ["q_proj", "down_proj"]},
    "ia3": {"type": "ia3"},
    "bottleneck": {"type": "bottleneck", "size": 5},
    "prompt": {"type": "prompt", "tokens": 4, "text": "the loom"},
    "prefix": {"type": "prefix", "tokens": 4},
}


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, rows, pace):
        if rows and rows[-1]["step"] == self.step:
            raise Killed


def train(place: Path, out: str, *overrides: str, restart: bool = False, callbacks=(), **settings):
    base = {**RECIPE, "data": {"sources": [str(place / "text.txt")], "valid": 0.1}, "tokenizer": str(place / "tok")}
    base |= {"model": str(place / "base" / "last"), "out": str(place / out), "steps": 8, "optim": {"lr": 3e-2}, "eval": {"every": 4}}
    return run_recipe(recipe(override({**base, **settings}, overrides)), restart, callbacks)


@pytest.fixture(scope="module", autouse=True)
def _no_measuring():
    """A third of a second that every run takes to measure the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.train.report.matmul_peak", lambda *_: 1e10)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, a tokenizer, and in `base` a model that was trained for a moment."""
    folder = tmp_path_factory.mktemp("adapters")
    make_inputs(folder)
    wider = {**MODEL, "dim": 32, "layers": [{**MODEL["layers"][0], "repeat": 2, "channel": {"type": "gated", "hidden": 64}}]}
    train(folder, "base", model=wider)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _is_resumed_exactly(place: Path, form: str) -> None:
    out, killed = place / form, f"{form} killed"
    for step in (2, 5):
        with pytest.raises(Killed):
            train(place, killed, adapter=FORMS[form], callbacks=[KillAt(step)])
    train(place, killed, adapter=FORMS[form])
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer/model.safetensors"):
        assert (out / "last" / name).read_bytes() == (place / killed / "last" / name).read_bytes(), name
    assert (out / "metrics.jsonl").read_bytes() == (place / killed / "metrics.jsonl").read_bytes()
    train(place, f"{form} other", adapter=FORMS[form], seed=1)
    first, other = tensors(out / "last"), tensors(place / f"{form} other" / "last")
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_trained_saved_resumed_and_opened(form, place):
    card = train(place, form, adapter=FORMS[form])
    out = place / form
    assert card["status"] == "finished"
    valid = [row["valid_loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "valid_loss" in row]
    assert valid[-1] != valid[0]
    assert form != "lora" or valid[-1] < valid[0]
    if form in ("lora", "prefix"):
        _is_resumed_exactly(place, form)
    first = tensors(out / "last")
    # What was saved is small, and opens as a model.
    assert card["model"]["trained"] == sum(tensor.numel() for tensor in first.values())
    assert not (out / "last" / "config.json").exists()
    model = load_model(out / "last", dtype=torch.float32).model
    if form in ("prompt", "prefix"):
        assert len(model.virtual_ids) == 4
        return
    assert has_adapter(model)
    ids = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        adapted = model(ids).logits
        with adapters_off(model):
            base = model(ids).logits
        assert torch.equal(base, load_model(place / "base" / "last", dtype=torch.float32).model(ids).logits)
    assert not torch.allclose(adapted, base, atol=1e-3)


def test_the_frozen_base_costs_two_bytes_a_weight_and_stays_as_it_is(place):
    given = {**RECIPE, "model": str(place / "base" / "last"), "adapter": "lora", "out": str(place / "unused"), "steps": 1}
    given |= {"data": str(place / "text.txt"), "tokenizer": str(place / "tok")}
    job = open_job(make_plan(recipe(given)), None, World())
    kinds = {(parameter.dtype, parameter.requires_grad) for parameter in job.policy.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    job = open_job(make_plan(recipe({**given, "adapter": {"type": "freeze", "layers": 1}})), None, World())
    assert {parameter.dtype for parameter in job.policy.parameters()} == {torch.float32}


def test_an_adapter_is_trained_further_and_gradient_checkpointing_changes_nothing(place):
    train(place, "first", adapter=FORMS["lora"])
    train(place, "second", model=str(place / "first" / "last"))
    first, second = tensors(place / "first" / "last"), tensors(place / "second" / "last")
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((place / out / "last" / "adapter_config.json").read_text()) for out in ("first", "second")]
    assert configs[0] == configs[1]
    train(place, "again", adapter=FORMS["lora"], gradient_checkpointing=True)
    assert all(torch.equal(tensor, first[name]) for name, tensor in tensors(place / "again" / "last").items())


def test_biases_and_layers_are_saved_as_whole_models(place):
    card = train(place, "freeze", adapter={"type": "freeze", "layers": 1})
    before, after = (load_model(place / out / "last", dtype=torch.float32).model for out in ("base", "freeze"))
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved == {name for name, _ in after.named_parameters() if name.startswith(("blocks.1.", "norm."))}
    assert card["model"]["trained"] == sum(after.get_parameter(name).numel() for name in moved)
    with pytest.raises(UserError, match="trains biases, but this model has none"):
        train(place, "bitfit", adapter="bitfit")
    assert not (place / "bitfit").exists()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_is_trained_on_a_quantised_base(kind, place):
    folder = place / kind
    loaded = load_model(place / "base" / "last", dtype=torch.float32)
    save_model(quantize(loaded.model, Quant(type=kind)), folder)
    with pytest.raises(UserError, match="is quantised, and such weights cannot be trained; train an adapter beside them"):
        train(place, f"{kind} alone", model=str(folder))
    train(place, f"{kind} lora", model=str(folder), adapter=FORMS["lora"])
    names = set(tensors(place / f"{kind} lora" / "last"))
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names  # PEFT's names, whatever format the base has
    engine = open_engine(place / f"{kind} lora" / "best")
    result = engine.generate([Request("the loom", SamplingParams(max_tokens=3, ignore_eos=True))])[0]
    assert len(result.ids) == 3


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"type": "lora", "rank": 0}, "rank is 0"),
        ({"type": "lora", "alpha": -2}, "alpha is -2"),
        ({"type": "lora", "dropout": 1.0}, "dropout is 1"),
        ({"type": "lora", "targets": []}, "targets"),
        ({"type": "lora", "rnk": 3}, "unknown key 'rnk' at adapter.rnk. Did you mean 'rank'"),
        ("lra", "'lra' is not known at adapter. Did you mean 'lora'"),
        ({"type": "lora", "targets": "q_prj"}, "no linear map of that name. Did you mean 'q_proj'"),
        ({"type": "freeze"}, "neither layers nor parts is given"),
        ({"type": "bottleneck", "parts": ["mixer", "mixer"]}, "name each part once"),
        ({"type": "bottleneck", "parts": ["cross"]}, "no layer of the model has such a part"),
    ],
)
def test_settings_that_mean_nothing_are_refused(adapter, message, place):
    with pytest.raises(UserError) as refused:
        train(place, "refused", adapter=adapter)
    assert message in str(refused.value)
    assert not (place / "refused").exists()


def test_the_mean_of_an_adapter_that_is_trained_further_is_refused_at_the_start(place):
    train(place, "once", adapter=FORMS["lora"], steps=1)
    with pytest.raises(UserError, match=r"average is given but model is the adapter .*once/last, whose factors mean nothing"):
        train(place, "mean", model=str(place / "once" / "last"), average={"count": 2})
    assert not (place / "mean").exists()


def test_an_adapter_without_a_model_or_on_an_adapter_is_refused(place):
    with pytest.raises(UserError, match="the model has no weights yet"):
        train(place, "refused", model=MODEL, adapter="lora")
    train(place, "one", adapter=FORMS["lora"])
    with pytest.raises(UserError, match=r"model is the adapter .*, and adapter asks for another upon it"):
        train(place, "refused", model=str(place / "one" / "best"), adapter="ia3")
    assert not (place / "refused").exists()
    (place / "one" / "last" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is cut short"):
        train(place, "one", "optim.lr=3e-2", adapter=FORMS["lora"])


def test_numbers_that_are_not_finite_are_refused_by_name(place):
    train(place, "spoilt", adapter=FORMS["lora"], steps=1)
    folder = place / "spoilt" / "last"
    (folder / "weft_adapter.json").unlink()  # so that the base may be read in another format
    found = tensors(folder)
    name = next(name for name in found if name.endswith("lora_B.weight"))
    for value in (math.nan, math.inf):
        save_file({**found, name: torch.full_like(found[name], value)}, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=rf"last is damaged: {re.escape(name)} holds numbers that are not finite"):
            load_model(folder)
    save_file({**found, name: torch.full_like(found[name], 1e30)}, folder / "adapter_model.safetensors")
    load_model(folder)
    half = load_model(place / "base" / "last", dtype=torch.float16)
    with pytest.raises(UserError, match=r"its change of blocks\.\d\.\S+ has numbers too large for float16; take dtype float32"):
        put_adapters(half.model, {"a": read_adapter(folder)}, FAMILIES["llama"])
    save_file(found, folder / "adapter_model.safetensors")
    half = load_model(place / "base" / "last", dtype=torch.float16)
    put_adapters(half.model, {"a": read_adapter(folder)}, FAMILIES["llama"])


@pytest.mark.parametrize(
    "verb",
    [["quantize", "ADAPTER", "--to", "int8", "-o", "OUT"], ["export", "ADAPTER", "--to", "gguf", "-o", "OUT"], ["verify", "ADAPTER"]],
)
def test_verbs_that_need_one_set_of_weights_say_so(verb, place, tmp_path):
    if not (place / "one for verbs").exists():
        train(place, "one for verbs", adapter="ia3", steps=1)
    words = {"ADAPTER": str(place / "one for verbs" / "last"), "OUT": str(tmp_path / "out")}
    outcome = CliRunner().invoke(app, [words.get(word, word) for word in verb])
    assert isinstance(outcome.exception, UserError)
    assert "weft merge adapter" in str(outcome.exception)
    assert not (tmp_path / "out").exists()


def test_muon_leaves_factors_to_adamw(place):
    train(place, "by muon", adapter=FORMS["lora"], optim={"name": "muon", "lr": 3e-2})
    train(place, "by adamw", adapter=FORMS["lora"], optim={"name": "adamw", "lr": 3e-2})
    one, other = (tensors(place / name / "last") for name in ("by muon", "by adamw"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    model = load_model(place / "by muon" / "last").model
    assert {weight.kind for weight in trained_weights(model)} == {"factor"}


def test_a_classifier_is_trained_through_an_adapter_and_trained_further(place):
    lines = [{"text": f"the {word} crosses {i}", "label": label} for i in range(12) for word, label in (("weft", "a"), ("warp", "b"))]
    (place / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = {"data": {"sources": [str(place / "labels.jsonl")], "valid": 0.2}, "objective": "classify", "batch": {"rows": 6}}
    train(place, "classes", adapter=FORMS["lora"], **given)
    first = tensors(place / "classes" / "last")
    assert first["base_model.model.score.weight"].shape == (2, 32)
    loaded = load_model(place / "classes" / "last")
    assert (loaded.spec.score, loaded.model.spec.labels) == (2, ("a", "b"))
    train(place, "classes further", model=str(place / "classes" / "last"), **given)
    second = tensors(place / "classes further" / "last")
    assert first.keys() == second.keys()
    assert not any(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("form", ["lora", "prefix"])
def test_a_preference_run_begins_at_its_reference(form, place):
    """The policy without its adapter, or, where there are virtual tokens, a copy of it."""
    words = [("weft", "warp"), ("loom", "thread"), ("over", "under")]
    lines = [{"prompt": f"the {a}", "chosen": f" crosses {i}", "rejected": f" and {b}"} for i in range(6) for a, b in words]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = {"data": {"sources": [str(place / "pairs.jsonl")], "valid": 0.2}, "objective": "dpo", "batch": {"rows": 6}, "dtype": "float32"}
    out = f"dpo {form}"
    train(place, out, adapter={**FORMS[form], **({"dropout": 0.0} if form == "lora" else {})}, **given)
    rows = [json.loads(line) for line in (place / out / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert held_out[0] == pytest.approx(math.log(2), abs=1e-6)
    assert held_out[-1] != held_out[0]


def test_a_model_with_virtual_tokens_is_not_read_without_them(place):
    rows = [{"prompt": f"the {i}", "chosen": " weft", "rejected": " warp"} for i in range(12)]
    (place / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = {"data": {"sources": [str(place / "few.jsonl")], "valid": 0.2}, "batch": {"rows": 2}}
    for form in ("lora", "prompt", "prefix"):
        train(place, f"{form} beside", adapter=FORMS[form], steps=1)
    tuned = {form: str(place / f"{form} beside" / "last") for form in FORMS}
    train(place, "judge", adapter=FORMS["prompt"], objective="reward", steps=1, **pairs)
    judge, match = str(place / "judge" / "last"), {"rewards": {"length": {"most": 4}}, "max_tokens": 4}
    for settings, role in (
        ({"objective": {"type": "distill", "teacher": tuned["prefix"]}}, "teacher"),
        ({"objective": {"type": "dpo", "reference": tuned["prompt"]}, **pairs}, "reference"),
        ({"objective": {"type": "dpo", "reference": tuned["prompt"]}, "adapter": {"type": "prompt", "tokens": 3}, **pairs}, "reference"),
        ({"objective": {"type": "rejection", "samples": 2, "reward": judge, "max_tokens": 4}, **pairs}, "reward"),
        ({"objective": {"type": "ppo", "critic": {"model": tuned["prompt"]}, **match}, **pairs}, "critic"),
    ):
        with pytest.raises(UserError, match=f"the {role} model has an adapter of the form prompt or prefix, whose virtual tokens"):
            train(place, "alone", **settings)
    # Of one form with the policy, or of another form, they are read as they were trained.
    same = {"adapter": FORMS["prompt"], "objective": {"type": "dpo", "reference": tuned["prompt"]}, "steps": 1, **pairs}
    assert train(place, "both", **same)["status"] == "finished"
    assert train(place, "taught", objective={"type": "distill", "teacher": tuned["lora"]}, steps=1)["status"] == "finished"


def test_a_run_is_not_resumed_on_a_base_that_has_changed(place):
    moved, tokenizer = load_model(place / "base" / "last"), load_tokenizer(place / "tok")
    save_model(moved.model, place / "moved", tokenizer)
    with pytest.raises(Killed):
        train(place, "upon", model=str(place / "moved"), adapter=FORMS["lora"], callbacks=[KillAt(4)])
    with torch.no_grad():
        moved.model.norm.weight += 0.5
    save_model(moved.model, place / "moved", tokenizer)
    with pytest.raises(UserError, match=r"holds a run with model=.*moved, and that model has changed since"):
        train(place, "upon", model=str(place / "moved"), adapter=FORMS["lora"])
