"""Several runs from one file: what each one's recipe says, and whole chains that are stopped and go on."""

import json
import shutil

import online_cases as online
import pytest
import yaml

from weft.cli.main import main
from weft.errors import UserError
from weft.train.chain import read_chain
from weft.train.history import read_metrics

CHAIN = {
    "out": "runs",
    "model": "base",
    "steps": 7,
    "dtype": "float32",
    "chain": {
        "sft": {"data": "talks.jsonl", "objective": "sft"},
        "reward": {"data": "pairs.jsonl", "model": "$sft", "objective": "reward", "minutes": 2},
        "ppo": {"data": "prompts.jsonl", "model": "$sft", "objective": {"type": "ppo", "reward": "$reward"}, "steps": 3},
    },
}


def chain_of(folder, *overrides, **changes):
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({**CHAIN, **changes}, sort_keys=False))
    chain = read_chain(path, overrides)
    return dict(chain.recipes())


def test_what_stands_beside_the_chain_holds_for_all(tmp_path):
    runs = chain_of(tmp_path)
    assert list(runs) == ["sft", "reward", "ppo"]
    assert [(run.model, run.steps, run.minutes, run.dtype) for run in runs.values()] == [
        ("base", 7, None, "float32"),
        ("runs/1-sft/last", None, 2, "float32"),
        ("runs/1-sft/last", 3, None, "float32"),
    ]
    assert [run.out for run in runs.values()] == ["runs/1-sft", "runs/2-reward", "runs/3-ppo"]
    assert runs["ppo"].objective.reward == "runs/2-reward/last"


def test_the_best_weights_go_on_where_there_are_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/1-sft/best").mkdir(parents=True)
    runs = chain_of(tmp_path)
    assert runs["ppo"].model == "runs/1-sft/best"
    assert runs["ppo"].objective.reward == "runs/2-reward/last"


def test_overrides_of_all_runs_and_of_one(tmp_path):
    runs = chain_of(tmp_path, "steps=5", "model=other", "out=there", "ppo.objective.beta=0.3", "reward.steps=2", "optim.lr=1e-5")
    assert [run.steps for run in runs.values()] == [5, 2, 5]
    assert [run.minutes for run in runs.values()] == [None] * 3
    assert [run.model for run in runs.values()] == ["other", "there/1-sft/last", "there/1-sft/last"]
    assert runs["ppo"].objective.beta == 0.3
    assert runs["ppo"].objective.reward == "there/2-reward/last"
    assert {run.optim.lr for run in runs.values()} == {1e-5}


def test_a_value_set_for_all_leaves_what_stands_beside_it(tmp_path):
    own = {"optim": {"lr": 1e-3, "warmup": 4, "schedule": "cosine"}, "batch": {"rows": 8, "length": 384}}
    runs = chain_of(tmp_path, "optim.lr=1e-5", "batch.rows=2", chain={**CHAIN["chain"], "sft": {**CHAIN["chain"]["sft"], **own}})
    sft = runs["sft"]
    assert (sft.optim.lr, sft.optim.warmup, sft.optim.schedule) == (1e-5, 4, "cosine")
    assert (sft.batch.rows, sft.batch.length) == (2, 384)
    assert (runs["ppo"].optim.lr, runs["ppo"].batch.rows, runs["ppo"].batch.length) == (1e-5, 2, None)


@pytest.mark.parametrize(
    ("changes", "overrides", "sentence"),
    [
        ({"chain": {"sft": {"model": "$sft"}}}, (), r"sft.model is \$sft, but the runs before it are: none"),
        ({"chain": {**CHAIN["chain"], "more": {"model": "$rewrd"}}}, (), "Did you mean 'reward'"),
        ({"chain": {}}, (), "chain is no list of runs"),
        ({"chain": {"sft": 3}}, (), "chain is no list of runs"),
        ({"chain": {"batch": {}}}, (), "a run of the chain is called batch"),
        ({"out": None}, (), "no `out` is given"),
        ({}, ("ppo.objective.betta=1",), "unknown key 'betta'"),
        ({}, ("pppo.steps=1",), "unknown key 'pppo'"),
    ],
)
def test_a_chain_is_validated_whole(tmp_path, changes, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        chain_of(tmp_path, *overrides, **changes)


def test_a_recipe_of_one_run_is_no_chain(tmp_path):
    (tmp_path / "one.yaml").write_text("model: base\n")
    assert read_chain(tmp_path / "one.yaml") is None


def test_three_steps_in_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = online.write_run(tmp_path)
    common = {key: data[key] for key in ("model", "tokenizer", "optim", "log")} | {"dtype": "float32", "steps": 2}
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}:", "completion": f" {n}"}) + "\n" for n in range(12)))
    pairs = [{"prompt": f"say {n}:", "chosen": f" {n}", "rejected": " no"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ppo = {"type": "ppo", "reward": "$reward", "max_tokens": 6, "unfinished": "keep", "epochs": 1}
    batch = {"rows": 4, "length": 24}
    runs = {
        "sft": {"data": "talks.jsonl", "objective": "sft", "batch": batch},
        "reward": {"data": "pairs.jsonl", "model": "$sft", "objective": "reward", "batch": batch},
        "ppo": {"data": "prompts.jsonl", "model": "$sft", "objective": ppo, "batch": batch},
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({**common, "out": "three", "chain": runs}, sort_keys=False))
    monkeypatch.setattr("sys.argv", ["weft", "train", "chain.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, capsys.readouterr()
    cards = {name: json.loads((tmp_path / "three" / name / "run.json").read_text()) for name in ("1-sft", "2-reward", "3-ppo")}
    assert {card["status"] for card in cards.values()} == {"finished"}
    rows = read_metrics(tmp_path / "three/3-ppo/metrics.jsonl")
    # The same command again finds everything done; a run that is thrown away is done again, and only it.
    before = (tmp_path / "three/1-sft/last/model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "three/3-ppo")
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert (tmp_path / "three/1-sft/last/model.safetensors").stat().st_mtime_ns == before
    assert read_metrics(tmp_path / "three/3-ppo/metrics.jsonl") == rows
    # Where a run in its middle is done again otherwise, what came of it is not taken for what would come of it now.
    shutil.rmtree(tmp_path / "three/2-reward")
    monkeypatch.setattr("sys.argv", ["weft", "train", "chain.yaml", "reward.seed=1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "three/3-ppo holds a run with objective.reward=three/2-reward/" in said
    assert "has changed since. Put it back, or remove three/3-ppo to start anew." in said
