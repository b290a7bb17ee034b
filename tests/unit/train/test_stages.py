"""Runs in stages: who gets which steps, which batches, positions and learning rates; resumed across a border; and the mean at the end."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import train_cases as cases
from safetensors.torch import load_file

from weft.data.virtual import VirtualBatches
from weft.errors import UserError
from weft.nn.rescale import take_rope
from weft.nn.rope import inverse_frequencies
from weft.spec import Rope
from weft.spec.rewrite import with_rope
from weft.train.assemble import run_recipe
from weft.train.averaging import Averaging
from weft.train.history import read_metrics
from weft.train.plan import make_plan
from weft.train.recipe import override, recipe
from weft.train.report import Report
from weft.train.schedule import Schedule
from weft.train.settings import BatchSettings, EvalSettings, LogSettings, OptimSettings
from weft.train.stage_settings import AverageSettings, StageSettings
from weft.train.staged_batches import StagedBatches
from weft.train.stages import Stages
from weft.train.trainer import Trainer
from weft.weights.load import load_model


def stages_of(steps, *settings, **batch):
    return Stages([StageSettings.model_validate(each) for each in settings], steps, BatchSettings(**batch))


def test_steps_are_shared_out_by_hand():
    made = stages_of(10, {"share": 3}, {"share": 1}, {"share": 1})
    assert [(stage.first, stage.end) for stage in made.all] == [(0, 6), (6, 8), (8, 10)]
    assert [made.at(step).number for step in (0, 5, 6, 7, 8, 9, 10, 11)] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert [(s.first, s.end) for s in stages_of(3, {"share": 100}, {}, {}).all] == [(0, 1), (1, 2), (2, 3)]


def test_batches_that_are_not_named_are_the_recipes():
    made = stages_of(4, {}, {"batch": {"rows": 2}}, rows=8, micro=4, length=16)
    assert [(stage.batch.rows, stage.batch.micro, stage.batch.length) for stage in made.all] == [(8, 4, 16), (2, 2, 16)]


def test_the_learning_rate_is_one_path():
    made = stages_of(100, {"share": 3}, {"share": 1}, {"share": 1, "final": 0.0})
    plain = Schedule("cosine", warmup=10, final=0.2)
    path = made.path(plain)
    assert [path.factor(step, 100) for step in range(80)] == [plain.factor(step, 80) for step in range(80)]
    line = [path.factor(step, 100) for step in range(80, 100)]
    assert line[0] == pytest.approx(0.2)
    assert line[10] == pytest.approx(0.1)
    steps = {round(a - b, 12) for a, b in itertools.pairwise(line)}
    assert steps == {0.01}, "straight, and the step after the last would have 0"
    twice = stages_of(100, {"share": 2}, {"share": 1, "final": 0.6}, {"share": 1, "final": 0.0}).path(Schedule("constant", warmup=0))
    assert [twice.factor(step, 100) for step in (0, 49, 50, 75)] == [1, 1, 1, 0.6]
    assert twice.factor(74, 100) == pytest.approx(0.616)
    assert stages_of(4, {"final": 0.0}).path(plain).factor(2, 4) == 0.5


def test_batches_of_a_stage_are_a_function_of_the_step_and_go_on_in_the_same_data():
    small, large = cases.batches_of(rows=3), cases.batches_of(rows=6)
    made = StagedBatches(stages_of(10, {"share": 4}, {"share": 6}), [small, large], small)
    for step in range(4):
        assert torch.equal(made.batch(step).tokens, small.batch(step).tokens)
    for step in range(4, 10):
        assert torch.equal(made.batch(step).tokens, large.batch(step - 4 + 2).tokens), "12 rows are 2 batches of 6"
    seen = torch.cat([made.batch(step).tokens for step in range(5)])
    straight = torch.cat([small.batch(step).tokens for step in range(6)])
    assert torch.equal(seen, straight), "no row is read twice, none is left out"
    assert made.sizes(10) == [(4, 3 * 24, 24), (6, 6 * 24, 24)]
    assert made.sizes(3) == [(3, 3 * 24, 24)]
    for batches in (made, VirtualBatches(made, (90, 91))):
        report = Report(SimpleNamespace(batches=batches))
        assert report.sizes(10) == made.sizes(10)
        assert report.tokens(10) == (4 * 3 + 6 * 6) * 24
    table = made.report(10)
    rows = small.mixture.sources[0].windows.num_rows
    assert [line["epochs"] for line in table] == pytest.approx([12 / rows, 36 / rows])
    other = StagedBatches(stages_of(10, {"share": 4, "data": "other"}, {"share": 6}), [small, large], small)
    assert torch.equal(other.batch(4).tokens, large.batch(0).tokens), "control: other data begins at its beginning"


def test_positions_change_with_the_spec_and_nothing_else_does():
    model = cases.model_of()
    spec = with_rope(model.spec, {"base": 5e5}, 96)
    assert spec.context == 96
    assert {block.mixer.rope.base for block in spec.blocks()} == {5e5}
    assert with_rope(spec, {"base": 10000.0}, 24) == model.spec
    fresh = cases.build(spec, dtype=torch.float64, seed=3)
    fresh.load_state_dict(model.state_dict())
    tokens = torch.arange(20)[None]
    before = model(tokens).logits
    take_rope(model, spec)
    assert model.spec == spec
    assert torch.equal(model.blocks[1].mixer.rope.inverse_frequencies, inverse_frequencies(Rope(base=5e5), 4))
    assert torch.equal(model(tokens).logits, fresh(tokens).logits)
    assert (before - fresh(tokens).logits).abs().max() > 1e-4, "control: positions matter"


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five\n\n" * 120)
    (tmp_path / "b.txt").write_text("sechs sieben acht neun zehn\n\n" * 120)
    cases.save_tokenizer(tmp_path / "tok")
    return tmp_path


def staged(inputs, out, *overrides):
    data = {
        "model": {key: value for key, value in cases.LLAMA.items() if key != "vocab"},
        "data": str(inputs / "a.txt"),
        "tokenizer": str(inputs / "tok"),
        "out": str(inputs / out),
        "steps": 12,
        "dtype": "float32",
        "batch": {"rows": 2, "length": 12},
        "log": {"plot": False},
        "stages": [
            {"share": 1},
            {"share": 1, "batch": {"rows": 4}},
            {"share": 1, "batch": {"length": 48, "micro": 1}, "rope": {"base": 500000}},
            {
                "share": 1,
                "final": 0.0,
                "data": [{"path": str(inputs / "a.txt"), "weight": 0.25}, {"path": str(inputs / "b.txt"), "weight": 0.75}],
            },
        ],
        "average": {"count": 3},
    }
    return recipe(override(data, overrides))


class Stop(Exception):
    pass


def test_a_run_is_resumed_exactly_across_the_borders_of_stages(inputs, monkeypatch):
    card = run_recipe(staged(inputs, "straight"))
    assert card["model"]["spec"]["context"] == 48
    assert [line["source"].split(":")[0] for line in card["data"]] == ["stage 1", "stage 2", "stage 3", "stage 4", "stage 4"]
    assert [line["proportion"] for line in card["data"][-2:]] == [0.25, 0.75]
    assert card["cost"]["tokens"] == 3 * (2 * 12 + 4 * 12 + 2 * 48 + 2 * 12)
    rows = read_metrics(inputs / "straight/metrics.jsonl")
    assert [row["lr"] for row in rows if "lr" in row][-3:] == pytest.approx([1e-4, 2e-4 / 3, 1e-4 / 3])

    train, stops = Trainer._train, [2, 3, 5, 6, 7, 10]

    def killed(self, feed):
        if stops and self.state.step == stops[0]:
            stops.pop(0)
            raise Stop
        done = train(self, feed)
        self._save()
        return done

    monkeypatch.setattr(Trainer, "_train", killed)
    while stops:
        with pytest.raises(Stop):
            run_recipe(staged(inputs, "killed"))
    run_recipe(staged(inputs, "killed"))
    for name in ("last", "average", "snapshots/step-11"):
        one, other = (load_file(inputs / out / name / "model.safetensors") for out in ("straight", "killed"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert read_metrics(inputs / "killed/metrics.jsonl") == rows
    spec = load_model(inputs / "killed/last").spec
    assert (spec.blocks()[0].mixer.rope.base, spec.context) == (500000, 48)
    assert load_model(inputs / "killed/best").spec.context in (24, 48)


def test_without_its_stages_a_run_is_another_one(inputs):
    first, plain = run_recipe(staged(inputs, "first", "average=null")), run_recipe(staged(inputs, "plain", "stages=null", "average=null"))
    assert first["loss"] != plain["loss"]
    rows = [read_metrics(inputs / out / "metrics.jsonl") for out in ("first", "plain")]
    losses = [[row["loss"] for row in each if "loss" in row] for each in rows]
    assert losses[0][0] == losses[1][0]
    assert losses[0][4] != losses[1][4], "the second stage has other batches"


def test_the_mean_is_that_of_what_was_kept(inputs):
    card = run_recipe(staged(inputs, "run"))
    assert sorted(path.name for path in (inputs / "run/snapshots").iterdir()) == ["step-10", "step-11", "step-12"]
    given = [load_file(inputs / f"run/snapshots/step-{step}/model.safetensors") for step in (10, 11, 12)]
    mean = load_file(inputs / "run/average/model.safetensors")
    for name, tensor in mean.items():
        want = torch.stack([each[name].double() for each in given]).mean(0)
        torch.testing.assert_close(tensor.double(), want, rtol=2e-7, atol=1e-7)
    last = load_file(inputs / "run/last/model.safetensors")
    assert all(torch.equal(last[name], given[-1][name]) for name in last)
    assert any((mean[name] - last[name]).abs().max() > 1e-6 for name in mean), "control"
    assert card["average"]["loss"] > 0
    assert read_metrics(inputs / "run/metrics.jsonl")[-1]["average_loss"] == card["average"]["loss"]


def test_which_steps_are_kept(tmp_path):
    job = cases.job_of(tmp_path / "run", average=None)
    assert Averaging(job).steps(100) == []
    job.folder.release()
    made = recipe({"model": "gpt2", "data": "x", "out": "y", "steps": 100, "average": {"count": 4}})
    for changes, want in (({}, [93, 95, 98, 100]), ({"over": 1.0}, [25, 50, 75, 100]), ({"over": 0.02}, [99, 100])):
        job = cases.job_of(tmp_path / "run", average=made.average.model_validate({**made.average.model_dump(), **changes}))
        assert Averaging(job).steps(100) == want
        job.folder.release()


def test_a_run_that_stops_early_has_the_mean_of_what_it_kept(tmp_path):
    """And of its last weights."""
    early = {"evaluation": EvalSettings(every=1, patience=3), "optim": OptimSettings(lr=0.05)}
    job = cases.job_of(tmp_path / "run", steps=50, average=AverageSettings(count=25, over=1.0), log=LogSettings(plot=False), **early)
    card = Trainer(job).run()
    job.folder.release()
    last = card["run"]["steps_done"]
    assert card["status"] == "stopped early"
    assert card["average"]["loss"] > 0
    kept = sorted({*range(2, last, 2), last})
    assert {path.name for path in (tmp_path / "run/snapshots").iterdir()} == {f"step-{step}" for step in kept}
    given = [load_file(tmp_path / f"run/snapshots/step-{step}/model.safetensors") for step in kept]
    mean = load_file(tmp_path / "run/average/model.safetensors")
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, torch.stack([each[name] for each in given]).mean(0), rtol=0, atol=1e-12)
    assert not torch.equal(mean["model.norm.weight"], given[-1]["model.norm.weight"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps=3"], "steps is 3 but there are 4 stages"),
        (["steps=null", "minutes=1"], "stages share out a number of steps"),
        (["stages=[{final: 0.0}, {}]"], "a stage without `final` comes after one that has it"),
        (["stages=[{batch: {rows: 2, micro: 3}}]"], "a stage's micro is 3 but its rows are 2"),
        (["stages=[{rope: {bass: 1}}]"], "unknown key 'bass'.*Did you mean 'base'"),
        (["average.count=1"], "average.count is 1"),
    ],
)
def test_stages_that_cannot_be_are_refused(inputs, overrides, words):
    with pytest.raises(UserError, match=words):
        staged(inputs, "run", *overrides)


def test_every_stage_is_checked_before_anything_is_paid_for(inputs):
    for overrides, words in (
        (["stages=[{}, {data: nowhere.txt}]"], "there is no data at nowhere.txt"),
        (["model.layers=[{mixer: {type: mamba, state_dim: 4}}]"], "no layer of the model has any"),
        (
            ["model.position={type: learned, length: 24}", "stages=[{}, {batch: {length: 48}}]"],
            "learned position table has 24",
        ),
    ):
        with pytest.raises(UserError, match=words):
            make_plan(staged(inputs, "run", *overrides))
    assert not (inputs / "run").exists()
