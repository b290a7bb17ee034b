"""The loop: exact resume, early stopping, interruption, losses that are no number, and what a run leaves behind."""

import json
import math
from pathlib import Path

import pytest
import torch
import train_cases as cases

from weft.data.batches import Batches
from weft.data.windows import cut
from weft.errors import UserError
from weft.objectives.next_token import NextToken
from weft.train.budget import SETTLE, TIMED, Budget
from weft.train.callbacks import Callback
from weft.train.checkpoint import SavedRun
from weft.train.history import read_metrics
from weft.train.job import Compute, Length
from weft.train.objective import POLICY, Role, Term
from weft.train.optim import Optimizer, clip_gradients
from weft.train.report import Report
from weft.train.rng import capture_rng
from weft.train.settings import EvalSettings, LogSettings, OptimSettings, SaveSettings
from weft.train.trainer import Trainer
from weft.train.window import check_compiler
from weft.weights.load import load_model


class Stop(Exception):
    """Stands for a crash."""


class CrashAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, rows, pace) -> None:
        if pace.step == self.step:
            raise Stop


class Witness(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.steps: list[int] = []
        self.paces: list[object] = []

    def on_start(self, card) -> None:
        self.events.append("start")

    def on_log(self, rows, pace) -> None:
        self.steps += [row["step"] for row in rows]
        self.paces.append(pace)

    def on_evaluate(self, row) -> None:
        self.events.append(f"evaluate {row['step']}")

    def on_save(self, step, folder) -> None:
        self.events.append(f"save {folder.name} {step}")

    def on_end(self, card) -> None:
        self.events.append(card["status"])


EACH = {"log": LogSettings(every=1, plot=False), "save": SaveSettings(every=2, minutes=None), "evaluation": EvalSettings(every=3)}
DROPOUT = {"dropout": {"embed": 0.1, "attention": 0.1, "residual": 0.1}}


def _job(out: Path, **changes):
    return cases.job_of(out, **{**EACH, **changes})


def _run(job, *callbacks):
    try:
        return Trainer(job, callbacks).run()
    finally:
        job.folder.release()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).model.named_parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_crashed_and_went_on_is_the_run_that_did_not(tmp_path, optimizer):
    changes = {"optim": OptimSettings(name=optimizer), "micro": 3}
    straight = _run(_job(tmp_path / "straight", models={POLICY: cases.model_of(**DROPOUT)}, **changes))
    for crash in (1, 3, 5):
        with pytest.raises(Stop):
            _run(_job(tmp_path / "crashed", models={POLICY: cases.model_of(**DROPOUT)}, **changes), CrashAfter(crash))
    # Whatever the weights it begins with: they come from the checkpoint.
    card = _run(_job(tmp_path / "crashed", models={POLICY: cases.model_of(seed=99, **DROPOUT)}, **changes))
    assert card["run"]["resumed_from"] == 4
    assert straight["run"]["resumed_from"] == 0
    expected, found = _weights(tmp_path / "straight" / "last"), _weights(tmp_path / "crashed" / "last")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_metrics(tmp_path / "straight" / "metrics.jsonl") == read_metrics(tmp_path / "crashed" / "metrics.jsonl")
    assert (tmp_path / "straight/best/training.json").read_text() == (tmp_path / "crashed/best/training.json").read_text()
    # Negative control: without dropout it is another run.
    _run(_job(tmp_path / "other", models={POLICY: cases.model_of()}, **changes))
    assert not torch.equal(_weights(tmp_path / "other" / "last")["embed.weight"], expected["embed.weight"])


def test_a_run_leaves_the_callers_random_numbers_alone(tmp_path):
    before = capture_rng()
    _run(_job(tmp_path / "run", models={POLICY: cases.model_of(**DROPOUT)}))
    assert capture_rng() == before


def test_what_a_run_tells_and_leaves(tmp_path):
    witness = Witness()
    card = _run(_job(tmp_path / "run", log=LogSettings(every=4)), witness)
    assert witness.steps == [1, 2, 3, 4, 5, 6]
    assert witness.events[:4] == ["start", "save last 0", "save best 0", "evaluate 0"]
    assert witness.events[-1] == "finished"
    assert "evaluate 3" in witness.events
    assert [each for each in witness.events if each.startswith("save last")] == [f"save last {step}" for step in (0, 2, 4, 6)]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 3, 6]
    assert rows[1]["targets"] == cases.batches_of().batch(0).num_targets
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert card["cost"]["tokens"] == 6 * 7 * 24
    assert card["cost"]["flops"] == 3 * 7 * 6 * cases.spec_of().flops(24)
    assert card["data"][0]["epochs"] > 0
    assert card["cost"]["targets"] == sum(row["targets"] for row in rows if "targets" in row)
    page = (tmp_path / "run" / "run.md").read_text()
    assert "MFU" in page
    assert "| data | 100.0% |" in page
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert witness.paces[-1].seconds_left == 0


def test_an_objective_may_make_several_updates_of_one_batch(tmp_path, monkeypatch):
    class Halves(NextToken):
        def minibatches(self, batch):
            return batch.rows(0, 3), batch.rows(3, 7)

    inner = {"steps": 2, "optim": OptimSettings(warmup=0, schedule="constant"), "evaluation": EvalSettings(every=9)}
    model, by_hand = cases.model_of(), cases.model_of()
    counted, observe = [], Report.observe

    def watched(self, state, rows, seconds, **named):
        pace = observe(self, state, rows, seconds, **named)
        counted.append(round(pace.tokens_per_s * seconds))
        return pace

    monkeypatch.setattr(Report, "observe", watched)
    _run(_job(tmp_path / "run", models={POLICY: model}, objective=Halves(), **inner))
    assert counted == [7 * 24, 7 * 24], "the pace is that of steps, not of updates"
    optimizer = Optimizer(by_hand, inner["optim"])
    for step in range(2):
        for part in Halves().minibatches(cases.batches_of().batch(step)):
            terms, _ = NextToken().loss({POLICY: by_hand}, part)
            (terms["next_token"].sum / terms["next_token"].count).backward()
            clip_gradients(optimizer)
            optimizer.step(1.0)
    for found, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row] == [1, 1, 2, 2]


def test_two_trained_models_have_an_optimiser_each(tmp_path):
    """What a critic needs: its own settings, its own state, both in one checkpoint."""

    class WithCritic(NextToken):
        roles = {POLICY: Role(trained=True), "critic": Role(trained=True), "reference": Role(trained=False)}  # noqa: RUF012

        def counts(self, batch):
            return {**super().counts(batch), "value": batch.num_rows}

        def loss(self, models, batch):
            terms, metrics = super().loss(models, batch)
            distance = (models["critic"](batch.tokens).hidden - models["reference"](batch.tokens).hidden.detach()).square()
            return {**terms, "value": Term(distance.mean((1, 2)).sum(), batch.num_rows, 0.5)}, metrics

    def job(out, steps):
        models = {POLICY: cases.model_of(seed=1), "critic": cases.model_of(seed=2), "reference": cases.model_of(seed=3)}
        critic = {"critic": OptimSettings(name="muon", lr=0.02)}
        return _job(out, steps=steps, models=models, objective=WithCritic(), optims=critic, save=SaveSettings(every=2, minutes=None))

    straight, crashed = job(tmp_path / "straight", 6), job(tmp_path / "crashed", 6)
    _run(straight)
    with pytest.raises(Stop):
        _run(crashed, CrashAfter(3))
    again = job(tmp_path / "crashed", 6)
    _run(again)
    rows = [row for row in read_metrics(tmp_path / "straight/metrics.jsonl") if "loss" in row]
    assert rows[-1]["value"] < 0.8 * rows[0]["value"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["next_token"] + 0.5 * rows[0]["value"])
    assert rows[-1]["critic_lr"] == pytest.approx(20 * rows[-1]["lr"])
    for role in (POLICY, "critic"):
        for found, expected in zip(again.models[role].parameters(), straight.models[role].parameters(), strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(straight.models["reference"].embed.weight, cases.model_of(seed=3).embed.weight)
    assert not torch.equal(straight.models["critic"].embed.weight, cases.model_of(seed=2).embed.weight)


def test_watchers_cannot_steer(tmp_path):
    class Meddler(Callback):
        def on_log(self, rows, pace) -> None:
            for row in rows:
                row.clear()

        def on_evaluate(self, row) -> None:
            row["valid_loss"] = -1.0

    _run(_job(tmp_path / "watched"), Meddler())
    _run(_job(tmp_path / "alone"))
    assert read_metrics(tmp_path / "watched/metrics.jsonl") == read_metrics(tmp_path / "alone/metrics.jsonl")


def test_training_learns(tmp_path):
    """Sixty ids repeated over and over: the loss falls far below the entropy of guessing."""
    from weft.data.store import TokenStore

    store = TokenStore.from_lists([[(start + step) % cases.VOCAB for step in range(48)] for start in range(30)])
    batches = Batches(cut(store, 24), 8, seed=0)
    for name in ("adamw", "muon"):
        card = _run(_job(tmp_path / name, steps=60, batches=batches, optim=OptimSettings(name=name, lr=2e-2), evaluation=EvalSettings()))
        assert card["loss"] < 0.6 < math.log(cases.VOCAB) / 2, name


def test_early_stopping_keeps_the_best(tmp_path):
    settings = EvalSettings(every=1, patience=3)
    card = _run(_job(tmp_path / "run", steps=50, evaluation=settings, optim=OptimSettings(lr=0.05)))
    assert card["status"] == "stopped early"
    assert card["run"]["steps_done"] == card["best"]["step"] + 3
    facts = json.loads((tmp_path / "run/best/training.json").read_text())
    assert facts["step"] == card["best"]["step"]
    assert facts["valid_loss"] == card["best"]["loss"] < facts["valid_loss"] + 1
    # It is over: the same job again does nothing.
    witness = Witness()
    again = _run(_job(tmp_path / "run", steps=50, evaluation=settings, optim=OptimSettings(lr=0.05)), witness)
    assert again["status"] == "stopped early"
    assert again["run"]["steps_done"] == card["run"]["steps_done"]
    assert witness.events == []


def test_an_interrupted_run_saves_the_step_it_was_at_and_goes_on(tmp_path):
    class Interrupting(Callback):
        def on_log(self, rows, pace) -> None:
            if pace.step == 3:
                trainer.interrupt.wanted = True

    job = _job(tmp_path / "run", save=SaveSettings(minutes=None))
    trainer = Trainer(job, [Interrupting()])
    card = trainer.run()
    job.folder.release()
    assert card["status"] == "interrupted"
    assert card["run"]["steps_done"] == SavedRun(tmp_path / "run/last").state.step == 3
    assert _run(_job(tmp_path / "run", save=SaveSettings(minutes=None)))["status"] == "finished"
    _run(_job(tmp_path / "straight"))
    assert read_metrics(tmp_path / "run/metrics.jsonl") == read_metrics(tmp_path / "straight/metrics.jsonl")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_step(tmp_path):
    class Poison(Callback):
        def on_save(self, step, folder) -> None:
            if step == 4 and folder.name == "last":
                with torch.no_grad():
                    model.embed.weight[5] = math.nan

    model = cases.model_of()
    with pytest.raises(UserError, match=r"the loss of step 5 is nan.*weights of step 4 are kept in .*last.*Lower optim\.lr"):
        _run(_job(tmp_path / "run", models={POLICY: model}), Poison())
    assert all(torch.isfinite(weight).all() for weight in _weights(tmp_path / "run" / "last").values())
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]


def test_a_disk_that_is_full_is_a_sentence(tmp_path, monkeypatch):
    job = _job(tmp_path / "run")

    class FullAfter(Callback):
        def on_save(self, step, folder) -> None:
            if step == 2:
                monkeypatch.setattr("weft.train.checkpoint.write_safetensors", full)

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot be written after step 4 \(No space left on device\). The weights of step 2 are kept"):
        _run(job, FullAfter())
    assert SavedRun(tmp_path / "run/last").state.step == 2


def test_a_missing_compiler_is_a_sentence(monkeypatch):
    def broken(*arguments, **more):
        raise RuntimeError("No working C++ compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"does not work here \(No working C\+\+ compiler found\); set compile to false"):
        check_compiler(torch.device("cpu"))


def test_other_settings_or_other_data_are_not_resumed(tmp_path):
    with pytest.raises(Stop):
        _run(_job(tmp_path / "run"), CrashAfter(3))
    with pytest.raises(UserError, match=r"steps = 6, but the recipe now says 7.*--restart"):
        _run(_job(tmp_path / "run", essentials={"steps": 7}))
    with pytest.raises(UserError, match=r"other data: data\.batch_size was 7 and is 6"):
        _run(_job(tmp_path / "run", batches=cases.batches_of(6)))
    assert _run(_job(tmp_path / "run"))["status"] == "finished"


def test_a_time_budget_becomes_steps_and_is_the_run_of_so_many_steps(tmp_path, monkeypatch):
    steps = 20
    monkeypatch.setattr(Budget, "fix", lambda self, evaluation, every: (steps, every))
    warm = {"optim": OptimSettings(warmup=10), "save": SaveSettings(minutes=None), "evaluation": EvalSettings(every=5)}
    card = _run(_job(tmp_path / "timed", length=Length(minutes=0.02), **warm))
    assert card["run"]["steps"] == card["run"]["steps_done"] == steps
    assert SETTLE + 2 <= SavedRun(tmp_path / "timed/last").state.probe <= SETTLE + TIMED
    _run(_job(tmp_path / "counted", length=Length(steps=steps), **warm))
    timed, counted = ([row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("timed", "counted"))
    assert timed == counted
    _run(_job(tmp_path / "longer", length=Length(steps=steps + 9), **warm))
    longer = [row for row in read_metrics(tmp_path / "longer/metrics.jsonl") if "loss" in row]
    assert timed[-1] != longer[steps - 1], "negative control: the length decides the rates"


def test_a_run_killed_before_its_length_is_known_begins_again(tmp_path):
    with pytest.raises(Stop):
        _run(_job(tmp_path / "run", length=Length(minutes=0.02)), CrashAfter(2))
    assert SavedRun(tmp_path / "run/last").state.step == 0
    card = _run(_job(tmp_path / "run", length=Length(minutes=0.02)))
    assert card["status"] == "finished"
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, card["run"]["steps"] + 1))
    assert next(row["step"] for row in rows if "valid_loss" in row) == 0


def test_data_without_a_held_out_part_is_trained_on_all_the_same(tmp_path):
    batches = Batches(cut(cases.store_of(), 24), 7)
    card = _run(_job(tmp_path / "run", batches=batches))
    assert card["best"] is None
    assert not (tmp_path / "run" / "best").exists()
    assert card["status"] == "finished"


def test_float32_weights_and_bfloat16_products(tmp_path):
    changes = {"models": {POLICY: cases.model_of(torch.float32)}, "compute": Compute(torch.device("cpu"), torch.bfloat16)}
    card = _run(_job(tmp_path / "run", **changes))
    assert card["run"]["dtype"] == "bfloat16"
    assert {weight.dtype for weight in _weights(tmp_path / "run/last").values()} == {torch.float32}
