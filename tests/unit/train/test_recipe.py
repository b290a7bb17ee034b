"""Recipes: overrides, defaults, and everything that is refused before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_cases as cases
import yaml

from weft.errors import UserError
from weft.train.chain import read_chain
from weft.train.plan import make_plan
from weft.train.recipe import override, read_recipe, recipe
from weft.weights.save import save_model

ROOT = Path(__file__).resolve().parents[3]
LEAST = {"model": "gpt2", "data": "text.txt", "out": "run", "steps": 10}


def test_the_least_a_recipe_says():
    made = recipe(LEAST)
    assert made.seed == 0
    assert made.optim.name == "adamw"
    assert made.objective.label_smoothing == 0
    assert recipe(yaml.safe_load(made.to_yaml())) == made


def test_overrides_are_dotted_and_read_as_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "optim": {"lr": 1e-3, "name": "muon"}, "model": {"dim": 8, "layers": []}}))
    made = read_recipe(path, ["optim.lr=3e-4", "batch.rows=4", "data=[a.txt, b.txt]", "model.dim=16", "optim.clip=null", "compile=true"])
    assert (made.optim.lr, made.optim.name, made.optim.clip, made.batch.rows) == (3e-4, "muon", None, 4)
    assert made.data == ["a.txt", "b.txt"]
    assert made.model == {"dim": 16, "layers": []}
    assert made.compile is True


def test_one_length_takes_the_place_of_the_other():
    assert recipe(override(LEAST, ["minutes=0.5"])).steps is None
    assert recipe(override({**LEAST, "steps": None, "minutes": 3}, ["steps=7"])).minutes is None
    with pytest.raises(UserError, match="steps is 4 and minutes 2; a run has one length"):
        recipe(override(LEAST, ["minutes=2", "steps=4"]))
    assert LEAST["steps"] == 10, "the given mapping is not changed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optm.lr=1"], "unknown key 'optm'.*Did you mean 'optim'"),
        (["optim.learning=1"], "unknown key 'learning' at optim.learning.*Allowed here:.*lr"),
        (["optim.lr=-1"], "optim.lr is -1"),
        (["optim.lr=fast"], "optim.lr is 'fast'"),
        (["optim.name=adam"], "'adam' is not known at optim.name.*Did you mean 'adamw'.*muon"),
        (["objective.type=next_tokn"], "next_tok"),
        (["minutes=-3"], "minutes is -3"),
        (["steps=0"], "steps is 0"),
        (["steps=null"], "neither steps nor minutes"),
        (["out=null"], "no out is given"),
        (["data="], "no data is given"),
        (["batch.micro=17"], "batch.micro is 17 but batch.rows 16"),
        (["optim.matrix_lr=0.1"], "matrix_lr is 0.1 but name is adamw"),
        (["model.vocab=5"], "model.vocab cannot be set: model is 'gpt2'"),
        (["steps"], "'steps' is not an assignment"),
        (["=3"], "not an assignment"),
        (["dtype=float16"], "'float16' is not known at dtype"),
        (["model={dim: 8}", "pretrained=true"], "pretrained is true but model is a spec"),
        (["seed=-1"], "seed is -1"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(overrides, message):
    with pytest.raises(UserError, match=message):
        recipe(override(LEAST, overrides))


def test_entries_of_lists_are_set_by_number():
    data = {**LEAST, "stages": [{"share": 1}, {"share": 2}]}
    made = recipe(override(data, ["stages.1.share=3", "stages.0.batch.rows=4", "stages.1.data=[a.txt]"]))
    assert [stage.share for stage in made.stages] == [1, 3]
    assert (made.stages[0].batch.rows, made.stages[1].data) == (4, ["a.txt"])
    assert data["stages"][1] == {"share": 2}, "the given mapping is not changed"
    with pytest.raises(UserError, match="there is a list of 2, whose entries are 0 to 1, and not 2"):
        override(data, ["stages.2.share=3"])


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_recipe(tmp_path / "none.yaml")
    for text, message in (("a: [", "not valid YAML"), ("- 1", "is not a recipe")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_recipe(tmp_path / "bad.yaml")


def test_reading_a_recipe_needs_no_torch():
    code = "import sys, weft.train.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two three\n" * 50)
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return cases.save_tokenizer(tmp_path / "tok")


def _plan(text, tokenizer, *overrides, **changes):
    data = {"model": {key: value for key, value in cases.LLAMA.items() if key != "vocab"}, "data": str(text), "out": "run", "steps": 3}
    return make_plan(recipe(override({**data, "tokenizer": str(tokenizer), **changes}, overrides)))


def test_vocab_comes_from_the_tokenizer_and_length_from_the_model(text, tokenizer):
    plan = _plan(text, tokenizer)
    assert plan.spec.vocab == plan.tokenizer.vocab_size == 258
    assert plan.length == 24
    assert _plan(text, tokenizer, "model.vocab=300", "batch.length=9").spec.vocab == 300


def test_a_model_is_a_name_or_a_file(text, tokenizer, tmp_path):
    assert _plan(text, tokenizer, "model=gpt2").spec.dim == 768
    (tmp_path / "spec.yaml").write_text(cases.spec_of(vocab=300).to_yaml())
    assert _plan(text, tokenizer, f"model={tmp_path / 'spec.yaml'}").spec == cases.spec_of(vocab=300)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=gpt-2"], "model is 'gpt-2', which is neither.*Did you mean 'gpt2'"),
        (["model=missing.yaml"], "there is no file missing.yaml"),
        (["model.heads=3"], "unknown key 'heads'"),
        (["model.vocab=100"], "model's vocab is 100 but the tokenizer has 258"),
        (["model.dim=15"], "dim is 15 and heads 4"),
        (["data=missing.txt"], "there is no data at missing.txt"),
        (["tokenizer=missing.json"], "there is no tokenizer at missing.json"),
        (["tokenizer=null"], "there is no tokenizer to read it with"),
        (["model.position={type: learned, length: 24}", "batch.length=25"], "batch.length is 25 but the model has 24 positions"),
        (["model.layers=[{mixer: {type: attention, heads: 2, causal: false}}]"], "causal: false"),
        (["model.layers=[{cross: {type: cross_attention, heads: 2, memory_length: 3}}]"], "cross-attention"),
        (["model.layers=[{mixer: {type: lstm}}]", "compile=true"], "compile is true but the model has LSTM"),
    ],
)
def test_files_that_do_not_go_together(text, tokenizer, overrides, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        _plan(text, tokenizer, *overrides)
    assert not (tmp_path / "run").exists()


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "instructgpt"], ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid(path, text, tokenizer, tmp_path):
    keys = yaml.safe_load(path.read_text())
    overrides = [f"data={text}", f"tokenizer={tokenizer}", "out=run"]
    if keys.get("pretrained"):  # of a small model in place of the one that would have to be pulled
        save_model(cases.model_of(torch.float32, vocab=300, context=512), tmp_path / "model")
        overrides += [f"model={tmp_path / 'model'}", "pretrained=false"]
    assert make_plan(read_recipe(path, overrides)).spec.num_params() > 0
    assert {"model", "data", "out", "seed"} <= set(keys)
    assert {"steps", "minutes"} & set(keys)


def test_the_chained_recipe_of_the_project_is_valid():
    chain = read_chain(ROOT / "recipes" / "instructgpt.yaml")
    kinds = {name: made.objective.type for name, made in chain.recipes()}
    assert kinds == {"sft": "sft", "reward": "reward", "ppo": "ppo"}
