"""Checkpoints: what a kill can leave behind, what damage is noticed, and whose folder it is."""

import json
import os
import shutil

import pytest
import torch
import train_cases as cases

from weft.errors import UserError
from weft.train.checkpoint import SavedRun, TrainState, save_checkpoint
from weft.train.history import MetricsFile
from weft.train.objective import POLICY
from weft.train.optim import Optimizer
from weft.train.rng import capture_rng, restore_rng
from weft.train.run_folder import RunFolder, check_out
from weft.train.settings import OptimSettings
from weft.train.trainer import Trainer


@pytest.fixture
def saved(tmp_path):
    """A folder with a finished run's checkpoint."""
    job = cases.job_of(tmp_path / "run", steps=2)
    Trainer(job).run()
    job.folder.release()
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["trainer.json", "model.safetensors", "optimizer/model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["cut short", "altered", "missing"])
def test_damage_is_named_and_nothing_is_trained(saved, name, damage):
    path = saved / "last" / name
    data = bytearray(path.read_bytes())
    if damage == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "altered":
        at = data.index(b'"step": 2') + 8 if name == "trainer.json" else len(data) * 3 // 4
        data[at] = ord("3") if name == "trainer.json" else data[at] ^ 1
        path.write_bytes(data)
    else:
        path.unlink()
    metrics = (saved / "metrics.jsonl").read_bytes()
    job = cases.job_of(saved, steps=2)
    with pytest.raises(UserError, match=rf"cannot be resumed: .*{name}.*--restart"):
        Trainer(job).run()
    job.folder.release()
    assert (saved / "metrics.jsonl").read_bytes() == metrics


def test_an_intact_checkpoint_is_read_back_exactly(saved):
    run = SavedRun(saved / "last")
    model, other = cases.model_of(seed=7), cases.model_of(seed=8)
    optimizer = Optimizer(model, OptimSettings())
    run.load({POLICY: model}, {POLICY: optimizer})
    assert run.state.step == 2
    assert run.state.finished == "finished"
    assert any(name.endswith("exp_avg_sq") for name in optimizer.state())
    again = saved.parent / "again"
    save_checkpoint(again, {POLICY: model}, {POLICY: optimizer}, run.state, run.rng)
    for name in ("model.safetensors", "optimizer/model.safetensors"):
        assert (again / name).read_bytes() == (saved / "last" / name).read_bytes()
    save_checkpoint(again, {POLICY: other}, {POLICY: optimizer}, run.state, run.rng)
    assert (again / "model.safetensors").read_bytes() != (saved / "last" / "model.safetensors").read_bytes()


def test_nothing_stored_is_pickled(saved):
    files = [path for path in (saved / "last").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_a_kill_between_the_two_renames_loses_nothing(saved):
    """The swap of two folders is two renames: after the first, the old checkpoint stands aside and the new one waits."""
    before = (saved / "last" / "model.safetensors").read_bytes()
    old = saved / ".last.old.abc"
    old.mkdir()
    os.replace(saved / "last", old / "was")
    shutil.copytree(saved / "best", saved / ".last.xyz")
    (saved / ".metrics.jsonl.q1").write_text("half")
    for name in ("snapshots/step-1", "snapshots/.step-2.x1", "data/text-0", "data/.text-1.x2"):
        (saved / name).mkdir(parents=True)
    folder = RunFolder(saved)
    folder.release()
    assert (saved / "last" / "model.safetensors").read_bytes() == before
    for name, kept in (("snapshots", "step-1"), ("data", "text-0")):
        assert [path.name for path in (saved / name).iterdir()] == [kept], "what is half written is made again"
        shutil.rmtree(saved / name)
    assert sorted(path.name for path in saved.iterdir()) == [".lock", "best", "last", "loss.png", "metrics.jsonl", "run.json", "run.md"]


def test_a_kill_after_both_renames_leaves_the_new_one(saved):
    old = saved / ".last.old.abc"
    old.mkdir()
    shutil.copytree(saved / "best", old / "was")
    before = sorted(path.name for path in (saved / "last").iterdir())
    RunFolder(saved).release()
    assert sorted(path.name for path in (saved / "last").iterdir()) == before
    assert not old.exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, saved):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds chapter1\.tex and is not a folder of an earlier run"):
        RunFolder(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="which is a file"):
        check_out(tmp_path / "file")
    check_out(saved)
    check_out(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    first = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="another process is training in"):
        RunFolder(tmp_path / "run")
    first.release()
    RunFolder(tmp_path / "run").release()


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, saved):
    new = RunFolder(tmp_path / "new")
    new.abandon()
    assert not (tmp_path / "new").exists()
    old = RunFolder(saved)
    old.abandon()
    old.release()
    assert (saved / "last").is_dir()


def test_clearing_keeps_prepared_data(saved):
    (saved / "data").mkdir()
    (saved / "data" / "x").write_text("1")
    folder = RunFolder(saved)
    folder.clear()
    folder.release()
    assert sorted(path.name for path in saved.iterdir()) == [".lock", "data", "run.json"]


def test_random_numbers_go_on_where_they_stopped():
    import random

    import numpy as np

    def draw():
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), torch.rand(3).tolist()]

    draw()
    state = json.loads(json.dumps(capture_rng()))
    expected = [draw() for _ in range(3)]
    assert draw() != expected[0]
    restore_rng(state)
    assert [draw() for _ in range(3)] == expected


def test_metrics_are_cut_back_to_what_belongs_to_a_state(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.append([{"step": 1, "loss": 2.5}])
    length = file.length
    file.append([{"step": 2, "loss": 2.25}])
    with open(path, "ab") as end:
        end.write(b'{"step": 3, "lo')
    again = MetricsFile(path, length)
    again.append([{"step": 2, "loss": 2.0}])
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n'


def test_a_state_of_another_version_is_refused(saved):
    path = saved / "last" / "trainer.json"
    from weft.train.checkpoint import _digest

    body = json.loads(path.read_text())
    body.pop("sha256")
    body["version"] = 99
    path.write_text(json.dumps({"sha256": _digest(body), **body}))
    with pytest.raises(UserError, match="another version of Weft"):
        SavedRun(saved / "last")
    assert TrainState().step == 0
