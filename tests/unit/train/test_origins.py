"""The models that a run reads: their fingerprints, and that a run does not go on with others."""

import json
import shutil

import online_cases as online
import pytest
import torch
import train_cases as cases
import yaml

from weft.errors import UserError
from weft.train import origins
from weft.train.assemble import run_recipe
from weft.train.callbacks import Callback
from weft.train.origins import file_fingerprint, fingerprint
from weft.train.recipe import recipe
from weft.weights.hub import pull
from weft.weights.load import load_model
from weft.weights.save import save_model


class Stop(Exception):
    """Stands for a crash."""


class CrashAtOnce(Callback):
    def on_log(self, rows, pace):
        raise Stop


ROLLOUT = {"samples": 2, "max_tokens": 6, "unfinished": "keep"}
JUDGED = {**ROLLOUT, "rewards": {"length": {"most": 3}}}
READ = {
    "model": ("talks.jsonl", "sft"),
    "objective.reference": ("pairs.jsonl", {"type": "dpo", "reference": "OTHER"}),
    "objective.teacher": ("talks.jsonl", {"type": "distill", "teacher": "OTHER"}),
    "objective.reward": ("prompts.jsonl", {"type": "grpo", "reward": "OTHER", **ROLLOUT}),
    "objective.critic.model": ("prompts.jsonl", {"type": "ppo", "critic": {"model": "OTHER"}, "epochs": 1, **JUDGED}),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with records, a tokenizer and two models: `base`, and `OTHER` with a score head."""
    monkeypatch.chdir(tmp_path)
    online.write_run(tmp_path)
    tokenizer = online.load_tokenizer(tmp_path / "tok")
    save_model(online.policy_of(3, torch.float32), tmp_path / "base", tokenizer)
    save_model(online.scorer_of(5, torch.float32), tmp_path / "OTHER", tokenizer)
    talks = [{"prompt": f"say {n}:", "completion": f" {n}"} for n in range(12)]
    pairs = [{"prompt": f"say {n}:", "chosen": f" {n}", "rejected": " no"} for n in range(12)]
    for name, rows in (("talks", talks), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def change(folder):
    """Move a hundredth of one weight."""
    loaded = load_model(folder)
    with torch.no_grad():
        loaded.model.blocks[1].channel.down.weight[0, :3] += 0.1
    save_model(loaded.model, folder, online.load_tokenizer(folder))


def run(data, objective, *callbacks, **changes):
    given = {"model": "base", "data": {"sources": [data], "valid": 0.2}, "objective": objective, "out": "run", "steps": 2}
    given |= {"batch": {"rows": 4, "length": 24}, "dtype": "float32", "log": {"plot": False, "every": 1}, "save": {"every": 1}}
    return run_recipe(recipe({**given, **changes}), callbacks=callbacks)


@pytest.mark.parametrize("key", READ)
def test_a_run_does_not_go_on_with_a_model_that_has_changed(place, key):
    source = place / ("base" if key == "model" else "OTHER")
    with pytest.raises(Stop):
        run(*READ[key], CrashAtOnce())
    shutil.copytree(source, place / "before")
    change(source)
    sentence = rf"run holds a run with {key}={source.name}, and that model has changed since\. Put it back, or remove run"
    with pytest.raises(UserError, match=sentence):
        run(*READ[key])
    shutil.rmtree(source)
    shutil.copytree(place / "before", source)
    assert run(*READ[key])["status"] == "finished"
    assert run(*READ[key])["status"] == "finished"
    change(source)
    with pytest.raises(UserError, match=sentence):
        run(*READ[key])


def test_what_is_no_change_is_none(place, monkeypatch):
    """A model trained again to the same weights, a run of before there were fingerprints, and other files of the folder."""
    with pytest.raises(Stop):
        run("talks.jsonl", "sft", CrashAtOnce())
    (place / "base" / "README.md").write_text("a note\n")
    save_model(load_model(place / "base").model, place / "base", online.load_tokenizer(place / "base"))
    assert run("talks.jsonl", "sft")["status"] == "finished"
    from weft.train.checkpoint import _digest

    state = place / "run/last/trainer.json"
    body = json.loads(state.read_text())
    body.pop("sha256")
    assert list(body["state"].pop("origins")) == ["model=base"]
    state.write_text(json.dumps({"sha256": _digest(body), **body}))
    change(place / "base")
    assert run("talks.jsonl", "sft")["status"] == "finished"


def test_a_spec_in_a_file_may_not_change_either(place):
    spec = {key: value for key, value in cases.LLAMA.items() if key != "vocab"} | {"context": 96, "vocab": 258}
    given = {"model": "spec.yaml", "tokenizer": "tok"}
    (place / "spec.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(Stop):
        run("talks.jsonl", "sft", CrashAtOnce(), **given)
    (place / "spec.yaml").write_text("# a comment\n" + yaml.safe_dump({**spec, "dropout": {"embed": 0.1}}))
    with pytest.raises(UserError, match=r"with model=spec\.yaml, and that model has changed"):
        run("talks.jsonl", "sft", **given)
    (place / "spec.yaml").write_text("# a comment\n" + yaml.safe_dump(spec))
    assert run("talks.jsonl", "sft", **given)["status"] == "finished"


def test_the_fingerprint_of_an_adapter_has_its_base_in_it(place):
    loaded = load_model(place / "base")
    run("talks.jsonl", "sft", adapter={"type": "lora", "rank": 2}, steps=1)
    adapter, bare = fingerprint("run/last"), fingerprint("base")
    assert adapter != bare
    change(place / "base")
    assert fingerprint("run/last") != adapter
    save_model(loaded.model, place / "base", online.load_tokenizer(place / "base"))
    assert (fingerprint("run/last"), fingerprint("base")) == (adapter, bare)


def test_a_gguf_file_and_a_pulled_model_have_fingerprints(place, monkeypatch):
    (place / "model.gguf").write_bytes(b"GGUF and so on")
    first = fingerprint("model.gguf")
    (place / "model.gguf").write_bytes(b"GGUF and so On")
    assert fingerprint("model.gguf") != first
    monkeypatch.setenv("WEFT_HOME", str(place / "home"))
    pull("./base", save_as="kept")
    assert fingerprint("kept") == fingerprint("base")


def test_large_files_are_looked_at_in_pieces_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "PIECES", 8)
    monkeypatch.setattr(origins, "PIECE", 16)
    path, content = tmp_path / "large", bytearray(range(256))
    path.write_bytes(content)
    first, seen = file_fingerprint(path), []
    for place in range(len(content)):
        content[place] ^= 1
        path.write_bytes(content)
        content[place] ^= 1
        if file_fingerprint(path) != first:
            seen.append(place)
    assert len(seen) == 8 * 16
    assert (seen[0], seen[-1]) == (0, len(content) - 1)
    path.write_bytes(content + b"\0")
    assert file_fingerprint(path) != first
    small = tmp_path / "small"
    small.write_bytes(content[:128])
    assert file_fingerprint(small) == origins.sha256(small)
