"""What a run is told to say about itself: its pace, its card, and whether it is the run that an earlier sitting began."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from weft.data.virtual import VirtualBatches
from weft.errors import UserError
from weft.files import atomic_write
from weft.machine import matmul_peak
from weft.train.card import Card, markdown, versions
from weft.train.checkpoint import TrainState
from weft.train.history import Row, read_metrics
from weft.train.job import Job
from weft.train.plot import plot_run
from weft.train.speed import Pace, peak_memory
from weft.train.staged_batches import StagedBatches
from weft.train.watched import LOSS
from weft.zoo import family_of


class Report:
    """Keeps what the card needs and the state does not hold.

    valid       the latest held-out figures; `average` are those of the mean of checkpoints.
    saved_step  of `last`, None before there is one.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.valid: dict[str, float] = {}
        self.saved_step: int | None = None
        self.peak = 0.0
        self._resumed_from = 0
        self._timed_tokens, self._timed_flops, self._timed_seconds = 0, 0.0, 0.0
        self.average: dict[str, float] = {}
        self._training: dict[str, float] = {}

    def sizes(self, steps: int) -> list[tuple[int, int, int]]:
        """Of the first `steps` steps: (steps, positions of a global batch, of a row), an entry for every stage of a run that has any."""
        batches = self.job.batches
        batches = batches.source if isinstance(batches, VirtualBatches) else batches
        return batches.sizes(steps) if isinstance(batches, StagedBatches) else [(steps, batches.tokens_per_batch, batches.length)]

    def tokens(self, steps: int) -> int:
        """Positions of the first `steps` global batches."""
        return sum(count * tokens for count, tokens, _ in self.sizes(steps))

    def flops(self, steps: int) -> float:
        """Of the first `steps` steps."""
        return sum(count * tokens / length * self._row_flops(length) for count, tokens, length in self.sizes(steps))

    def _row_flops(self, length: int) -> float:
        """Of training on a row: three times the forward pass (one forward, two backward), for every trained model; twice where an adapter
        is trained, as the weights have no gradients then."""
        total = 0.0
        for role, model in self.job.trained.items():
            ahead = model.spec.mtp_flops(length) if "mtp" in self.job.objective.roles[role].reads else 0
            total += (3 if model.adapters is None else 2) * (model.spec.flops(length) + ahead)
        return total

    def begin(self, state: TrainState) -> None:
        """Measure the machine, and write a card that says what is going on."""
        self.peak = matmul_peak(self.job.compute.device, self.job.compute.dtype) * self.job.world.size
        self._resumed_from = state.step
        self.saved_step = state.step if state.step else None
        if self.job.folder is not None:
            self.job.folder.write_card(self.card(state, "running"))

    def earlier_card(self, state: TrainState, status: str) -> Card:
        """The card of a run that was over before; written now, without its pace, where a kill came between its end and its card."""
        card = json.loads((self.job.out / "run.json").read_text(encoding="utf-8"))
        if card.get("status") != status:
            return self.finish(state, status)
        del card["format"]
        return {"watched": self._watched(), "training": {}, **card}  # which earlier versions did not write

    def _watched(self) -> list[dict[str, Any]]:
        return [asdict(each) for each in self.job.objective.watched]

    def check_resumable(self, state: TrainState) -> None:
        """Raise UserError where the settings, the data or the models it reads differ from those the run began with."""
        out = self.job.out
        remedy = "Set it back, or give --restart to start anew, or another out."
        for key, given in self.job.essentials.items():
            before = state.essentials.get(key)
            if before != given:
                key, before, given = _first_difference(key, before, given)
                raise UserError(f"{out} holds a run with {key} = {before}, but the recipe now says {given}. {remedy}")
        if state.data != self.job.batches.describe():
            key, before, given = _first_difference("data", state.data, self.job.batches.describe())
            raise UserError(f"{out} holds a run on other data: {key} was {before} and is {given}. {remedy}")
        for model, fingerprint in self.job.origins.items():
            if state.origins.get(model, fingerprint) != fingerprint:
                raise UserError(
                    f"{out} holds a run with {model}, and that model has changed since. Put it back, or remove {out} to start anew."
                )

    def what_is_kept(self) -> str:
        """Where the last good weights are, as a sentence."""
        if self.saved_step is None:
            return f"{self.job.out} holds no trained weights."
        return f"The weights of step {self.saved_step} are kept in {self.job.out / 'last'}."

    def observe(self, state: TrainState, rows: Sequence[Row], seconds: float, settling: bool) -> Pace:
        """The steps of these rows took so many seconds; `settling` where compilation was among them, which is not counted as pace."""
        means = {each.name: each.mean(rows) for each in (LOSS, *self.job.objective.watched)}
        self._training = {name: mean for name, mean in means.items() if mean is not None}
        before = state.step - len({row["step"] for row in rows})  # a step may have several updates, with a row each
        tokens, flops = self.tokens(state.step) - self.tokens(before), self.flops(state.step) - self.flops(before)
        if not settling:
            self._timed_tokens, self._timed_flops = self._timed_tokens + tokens, self._timed_flops + flops
            self._timed_seconds += seconds
        seconds = max(seconds, 1e-9)
        usual = self._timed_flops / self._timed_seconds if self._timed_seconds else flops / seconds
        left = None if state.total is None or settling else (self.flops(state.total) - self.flops(state.step)) / usual
        return Pace(state.step, state.total, tokens / seconds, flops / seconds / self.peak, left)

    def card(self, state: TrainState, status: str) -> Card:
        """What is known at this moment."""
        job, spec = self.job, self.job.policy.spec
        timed = max(self._timed_seconds, 1e-9)
        return {
            "status": status,
            "out": str(job.out),
            "model": {
                "parameters": spec.num_params(),
                "trained": sum(p.numel() for p in job.policy.parameters() if p.requires_grad),
                "family": family_of(spec).name,
                "spec": spec.model_dump(mode="json", exclude_defaults=True),
            },
            "run": {
                "objective": type(job.objective).__name__,
                "optimizer": job.optim.name,
                "steps": state.total,
                "steps_done": state.step,
                "minutes": job.length.minutes,
                "resumed_from": self._resumed_from,
                "tokens_per_step": job.batches.tokens_per_batch,
                "seed": job.seed,
                "device": str(job.compute.device),
                "threads": torch.get_num_threads(),
                "processes": job.world.size,
                "cores": os.cpu_count(),
                "dtype": str(job.compute.dtype).removeprefix("torch."),
                "compiled": job.compute.compiled,
                **job.facts,
            },
            "data": job.batches.report(state.step),
            "watched": self._watched(),
            "loss": self._training.get("loss", 0.0),
            "training": self._training,
            "valid": self.valid,
            "average": self.average,
            "best": None if state.best is None else {"loss": state.best, "step": state.best_step},
            "cost": {
                "seconds": state.seconds,
                "tokens": self.tokens(state.step),
                "targets": int(state.targets),
                "tokens_per_s": self._timed_tokens / timed,
                "flops": self.flops(state.step),
                "mfu": self._timed_flops / timed / self.peak if self.peak else 0.0,
                "peak_flops_per_s": self.peak,
                "peak_memory_bytes": peak_memory(job.compute.device),
            },
            "versions": versions(),
        }

    def finish(self, state: TrainState, status: str) -> Card:
        """Write the card, the page and the picture; the processes that do not lead only return the card."""
        card = self.card(state, status)
        folder = self.job.folder
        if folder is not None:
            folder.write_card(card)
            atomic_write(folder.path / "run.md", markdown(card))
            if self.job.log.plot:
                title = f"{card['model']['parameters']:,} parameters"
                plot_run(read_metrics(folder.metrics), self.job.objective.watched, folder.path / "loss.png", title)
        return card


def _first_difference(key: str, before: Any, given: Any) -> tuple[str, Any, Any]:
    """The innermost key under which two values differ, with both."""
    if isinstance(before, dict) and isinstance(given, dict):
        inner = next(name for name in {**before, **given} if before.get(name) != given.get(name))
        return _first_difference(f"{key}.{inner}", before.get(inner), given.get(inner))
    return key, before, given
