"""The one training loop. What is minimised is the objective's affair; how fast, how long and how safely is the trainer's."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weft.errors import UserError
from weft.machine import synchronize
from weft.nn.rescale import take_rope
from weft.train.averaging import Averaging
from weft.train.budget import SETTLE, Budget, evaluate_every
from weft.train.callbacks import Callback
from weft.train.checkpoint import SavedRun, TrainState, save_checkpoint, save_weights
from weft.train.evaluate import evaluate
from weft.train.feed import Feed
from weft.train.heap import Heap
from weft.train.history import History, MetricsFile, Row, check_finite
from weft.train.interrupt import Interrupt
from weft.train.job import Job
from weft.train.objective import POLICY, Batch, Role, Stateful, set_trained
from weft.train.optim import Optimizer, clip_gradients
from weft.train.report import Report
from weft.train.rng import capture_rng, restore_rng, seed_rng
from weft.train.speed import Stopwatch
from weft.train.stages import Stage
from weft.train.window import loss_function, open_window, run_window
from weft.weights.load import load_model

LOG_SECONDS = 1.0


class Trainer:
    """Trains the models of a job, from its beginning or from where an earlier sitting stopped.

    One step: the batch of that step, cut into micro-batches; every term's sum divided by its count over all of them and all
    processes; gradients summed, clipped by their common norm; one update of every trained model. Numbers stay on the device until
    they are logged, so that a step waits for nothing.
    """

    def __init__(self, job: Job, callbacks: Sequence[Callback] = ()) -> None:
        self.job, self.world, self.device = job, job.world, job.compute.device
        self.callbacks = list(callbacks) if job.world.leads else []
        for name, model in job.models.items():
            role = job.objective.roles.get(name, Role(trained=False))
            set_trained(model, role)
            model.gradient_checkpointing = role.trained and job.compute.gradient_checkpointing
        self.optimizers = {role: Optimizer(model, job.optims.get(role, job.optim)) for role, model in job.trained.items()}
        self.parameters = [parameter for optimizer in self.optimizers.values() for parameter in optimizer.parameters]
        self.schedules = {role: job.path(optimizer.settings) for role, optimizer in self.optimizers.items()}
        self.averaging = Averaging(job)
        self.micro, self._unstaged = job.micro, job.policy.spec
        self._stage: Stage | None = None
        self.compute = loss_function(job.objective, job.models, job.compute.dtype, job.compute.compiled)
        self.measure = loss_function(job.objective, job.models, job.compute.dtype)
        self.budget = None if job.length.minutes is None else Budget(job.length.minutes)
        self.history = History(self.world)
        self.state = TrainState()
        self.report = Report(job)
        self.interrupt = Interrupt(quiet=not self.world.leads)
        self._metrics: MetricsFile | None = None
        self.stopwatch = Stopwatch()
        self.heap = Heap()
        self._sitting = 0  # steps since this process began
        self._evaluation_seconds = 0.0
        self._logged_at = self._saved_at = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Train to the end, or to the step at which Ctrl-C came, and return the run card; its `status` says which.

        Raises UserError where the loss is no longer a number, and for a run that cannot be resumed: a damaged checkpoint, other
        settings, other data.
        """
        feed = Feed(self.job.batches.batch)
        before = capture_rng()
        try:
            with self.interrupt:
                over = self._begin()
                if over is not None:
                    return self.report.earlier_card(self.state, over)
                while self.state.finished is None and not self._train(feed):
                    pass
            return self._end()
        finally:
            feed.close()
            restore_rng(before)

    # The beginning and the end.

    def _begin(self) -> str | None:
        """Resume, or rehearse: a save, and where there is held-out data an evaluation, before the first step is paid for.

        Returns why the run was over already, or None.
        """
        seed_rng(self.job.seed + self.world.rank)
        self.world.wait()
        resumed = self.job.out.joinpath("last").is_dir()
        if resumed:
            self._resume(SavedRun(self.job.out / "last"))
            if self.state.finished is not None:
                return self.state.finished
        else:
            self.state.total = steps = self.job.length.steps
            if steps is not None:
                self.state.evaluate_every = self.job.evaluation.every or evaluate_every(steps)
            self.state.essentials, self.state.data = dict(self.job.essentials), self.job.batches.describe()
            self.state.origins = dict(self.job.origins)
        if self.job.folder is not None:
            self._metrics = MetricsFile(self.job.folder.metrics, self.state.metrics_length)
        self.report.begin(self.state)
        self._tell("on_start", self.report.card(self.state, "running"))
        if not resumed:
            self._save()
        if self.state.step == 0:
            self._evaluate()
        self.stopwatch.start()
        return None

    def _resume(self, saved: SavedRun) -> None:
        self.report.check_resumable(saved.state)
        saved.load(self.job.trained, self.optimizers)
        self.state = saved.state
        if isinstance(self.job.objective, Stateful):
            self.job.objective.load_state(saved.state.objective)
        if self.world.rank < len(saved.rng):
            restore_rng(saved.rng[self.world.rank])

    def _end(self) -> dict[str, Any]:
        """Fetch what is left, save, and write the card."""
        self._log()
        if self.state.finished is None and self.state.total is not None:
            self._save()
        card = self.report.finish(self.state, self.state.finished or "interrupted")
        self._tell("on_end", card)
        return card

    # One step, and what is due after it.

    def _train(self, feed: Feed) -> bool:
        """One batch: its update, or the updates of an inner loop, and whatever is due after it; True when the run has to stop here."""
        state, started = self.state, time.perf_counter()
        self._enter_stage()
        batch = self.job.objective.rollout(self.job.engine, feed.take(state.step))
        flags = [self.interrupt.wanted, self._is_time_to_log(), self._is_time_to_save()]
        for minibatch in self.job.objective.minibatches(batch):
            flags = self._update(minibatch, flags)
        state.step += 1
        if state.total is None:
            synchronize(self.device)
        return self._after_step(time.perf_counter() - started, *flags)

    def _update(self, batch: Batch, flags: Sequence[bool]) -> list[bool]:
        """One optimiser step; returns the flags that any process raised."""
        state = self.state
        window, raised = open_window(self.job.objective, batch, self.micro, self.device, self.world, flags)
        sums = run_window(window, self.compute, self.parameters, self.world)
        row: Row = {"step": state.step + 1, "targets": next(iter(window.counts.values()))}
        norms: list[Tensor] = []
        said: dict[str, Tensor] = {}
        for role, optimizer in self.optimizers.items():
            norms.append(clip_gradients(optimizer))
            factor = self.schedules[role].factor(state.step, state.total, state.probe)
            row |= {"lr" if role == POLICY else f"{role}_lr": optimizer.settings.lr * factor}
            optimizer.step(factor)
            stats = {name.removeprefix(f"{role}/"): value for name, value in sums.stats.items() if name.startswith(f"{role}/")}
            said |= {name if role == POLICY else f"{role}_{name}": v for name, v in self.job.models[role].after_step(stats).items()}
        said["grad_norm"] = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
        self.history.note(row, window.counts, sums, said)
        return raised

    def _after_step(self, seconds: float, stop: bool, log: bool, save: bool) -> bool:
        """Everything that happens between two steps. What all processes do together, all were told to do."""
        state, job = self.state, self.job
        fixed = self._fix_length(seconds)
        self.heap.after_step()
        self._sitting += 1
        if log or self._sitting == SETTLE or (job.log.every is not None and state.step % job.log.every == 0):
            self._log()
        if state.step == state.total:
            state.finished = "finished"
        if state.finished or (state.evaluate_every is not None and state.step % state.evaluate_every == 0):
            self._evaluate()
        if self.averaging.due(state.step, state.total, over=state.finished is not None):
            self._keep()
        if state.finished or fixed or save or (job.save.every is not None and state.step % job.save.every == 0 and state.total is not None):
            self._save()
        return stop or (self.world.size == 1 and self.interrupt.wanted)

    def _enter_stage(self) -> None:
        """Let batches and positions be those of the stage that the next step is in."""
        stages = self.job.stages
        stage = None if stages is None else stages.at(self.state.step)
        if stages is None or stage is None or stage is self._stage:
            return
        self._stage, self.micro = stage, stage.batch.micro
        spec = stages.spec(self._unstaged, self.state.step)
        if spec != self.job.policy.spec:
            take_rope(self.job.policy, spec)

    def _keep(self) -> None:
        """Keep these weights for the mean at the end, and make it where they are the last."""
        self._log()
        self.stopwatch.stop()
        state, job = self.state, self.job
        with self._writing():
            self.averaging.keep(state.step)
            folder = self.averaging.finish(state.step, state.total) if state.finished and state.total is not None else None
        if folder is not None and job.batches.valid is not None:
            mean = load_model(folder, self.device, next(job.policy.parameters()).dtype).model
            batches, models = job.batches.validation(job.evaluation.batches), {**job.models, POLICY: mean}
            compute = loss_function(job.objective, models, job.compute.dtype)
            engine = None if job.engine is None else replace(job.engine, models=models)
            measured = evaluate(job.objective, models, batches, compute, job.micro, self.device, self.world, engine)
            self.report.average = measured
            if self._metrics is not None:
                self._metrics.append([{"step": state.step, **{f"average_{name}": value for name, value in measured.items()}}])
        self.stopwatch.start()

    def _fix_length(self, seconds: float) -> bool:
        """Turn a time budget into steps when enough have been timed. Until then nothing is saved but the beginning: a run that is
        killed so early begins again, and what is fixed once is never fixed otherwise."""
        state = self.state
        if self.budget is None or state.total is not None or not self.world.lead(float(self.budget.observe(seconds))):
            return False
        total, every = self.budget.fix(self._evaluation_seconds, self.job.evaluation.every)
        state.total, state.evaluate_every, state.probe = int(self.world.lead(total)), int(self.world.lead(every)), state.step
        return True

    def _log(self) -> None:
        """Fetch the numbers of all steps since the last time, write them down and pass them on."""
        rows = self.history.fetch()
        if not rows:
            return
        check_finite(rows, self.report.what_is_kept())
        self.state.targets += sum(row["targets"] for row in rows)
        self._logged_at = time.perf_counter()
        if self._metrics is not None:
            self._metrics.append(rows)
        seconds = self.stopwatch.lap()
        self.state.seconds += seconds
        pace = self.report.observe(self.state, rows, seconds, settling=self._sitting <= SETTLE)
        self._tell("on_log", [dict(row) for row in rows], pace)

    def _evaluate(self) -> None:
        """Look at the held-out data, keep the best weights, and count how long they have not been bettered."""
        if self.job.batches.valid is None:
            return
        self._log()
        self.stopwatch.stop()
        state, settings, started = self.state, self.job.evaluation, time.perf_counter()
        job, batches = self.job, self.job.batches.validation(settings.batches)
        measured = evaluate(job.objective, job.models, batches, self.measure, job.micro, self.device, self.world, job.engine)
        self._evaluation_seconds = time.perf_counter() - started
        row = {"step": state.step, **{f"valid_{name}": value for name, value in measured.items()}}
        if not math.isfinite(measured["loss"]):
            raise UserError(
                f"the held-out loss after step {state.step} is {measured['loss']}, so training stopped. {self.report.what_is_kept()}"
            )
        if self._metrics is not None:
            self._metrics.append([row])
        self.report.valid = measured
        if state.best is None or measured["loss"] < state.best:
            state.best, state.best_step, state.stale = measured["loss"], state.step, 0
            self._save_best(row)
        else:
            state.stale += 1
        if settings.patience is not None and state.stale >= settings.patience and state.finished is None:
            state.finished = "stopped early"
        self._tell("on_evaluate", dict(row))
        self.stopwatch.start()

    def _save(self) -> None:
        """Write `last`. Rows are fetched first: a checkpoint is only made of weights whose losses were numbers."""
        self._log()
        self.stopwatch.stop()
        rng = self.world.gather(capture_rng())
        if self.job.folder is not None and self._metrics is not None:
            self.state.metrics_length = self._metrics.length
            job = self.job
            if isinstance(job.objective, Stateful):
                self.state.objective = job.objective.state()
            with self._writing():
                save_checkpoint(self.job.folder.last, job.trained, self.optimizers, self.state, rng, job.tokenizer, job.family)
            self.report.saved_step = self.state.step
            self._tell("on_save", self.state.step, self.job.folder.last)
        self.world.wait()
        self._saved_at = time.perf_counter()
        self.stopwatch.start()

    def _save_best(self, facts: Row) -> None:
        folder = self.job.folder
        if folder is not None:
            with self._writing():
                save_weights(folder.best, self.job.policy, self.job.tokenizer, self.job.family, facts)
            self._tell("on_save", self.state.step, folder.best)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full or failing disk is a sentence; what was saved before is untouched."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.job.out} cannot be written after step {self.state.step} ({error.strerror}). {self.report.what_is_kept()} "
                "Make room and run the same command to go on."
            ) from None

    def _is_time_to_log(self) -> bool:
        return self.world.leads and self.job.log.every is None and time.perf_counter() - self._logged_at > LOG_SECONDS

    def _is_time_to_save(self) -> bool:
        minutes = self.job.save.minutes
        known = self.state.total is not None
        return self.world.leads and known and minutes is not None and time.perf_counter() - self._saved_at > 60 * minutes

    def _tell(self, event: str, *facts: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*facts)
