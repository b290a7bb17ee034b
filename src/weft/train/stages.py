"""A run in stages: stretches of steps with batches, data, positions and a path of the learning rate of their own (The Llama 3 Herd of
Models 2024, section 3.4). What a stage is follows from the recipe and the step alone, so that a run goes on exactly wherever it stopped."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from weft.spec import ModelSpec
from weft.spec.rewrite import with_rope
from weft.train.schedule import Schedule
from weft.train.settings import BatchSettings
from weft.train.stage_settings import StageSettings


@dataclass(frozen=True)
class Stage:
    """Steps first to end - 1 of a run.

    rows, length, micro  of its batches; the length of None is the model's context.      final  share of the peak learning rate that the
    rate goes straight to, None where it follows the run's schedule.
    """

    number: int
    first: int
    end: int
    batch: BatchSettings
    settings: StageSettings

    @property
    def steps(self) -> int:
        return self.end - self.first

    @property
    def final(self) -> float | None:
        return self.settings.final

    @property
    def name(self) -> str:
        return self.settings.name or f"stage {self.number}"


class Stages:
    """The stages of a run of `steps` steps, which they share out in proportion, at least one each."""

    def __init__(self, settings: Sequence[StageSettings], steps: int, batch: BatchSettings) -> None:
        assert settings
        assert steps >= len(settings)
        shares = list(accumulate(each.share for each in settings))
        ends: list[int] = []
        for number, share in enumerate(shares, 1):
            least, most = (ends[-1] if ends else 0) + 1, steps - (len(shares) - number)
            ends.append(min(most, max(least, round(steps * share / shares[-1]))))
        self.all = tuple(
            Stage(number, first, end, each.batch.over(batch), each)
            for number, (first, end, each) in enumerate(zip([0, *ends], ends, settings, strict=False), 1)
        )
        self.steps = steps

    def at(self, step: int) -> Stage:
        """The stage of a step; beyond the last step that of the last."""
        return self.all[min(len(self.all) - 1, bisect_right([stage.end for stage in self.all], step))]

    def spec(self, base: ModelSpec, step: int) -> ModelSpec:
        """What the model is at a step: positions changed by the stages so far, and room for the longest rows."""
        spec = base
        for stage in self.all:
            if stage.first <= step:
                changes = stage.settings.rope.changes() if stage.settings.rope is not None else {}
                spec = with_rope(spec, changes, max(spec.context, stage.batch.length or 0))
        return spec

    def path(self, schedule: Schedule) -> "StagedSchedule":
        return StagedSchedule(schedule, self)


@dataclass(frozen=True)
class StagedSchedule:
    """A schedule over the stages that follow it, and straight lines over those that name a `final` share of their own, which come last."""

    plain: Schedule
    stages: Stages

    def factor(self, step: int, total: int | None, probe: int = 0) -> float:
        """Share of the peak learning rate at `step`, as `Schedule.factor`."""
        stage, first = self.stages.at(step), self._begin()
        if stage.final is None:
            return self.plain.factor(step, first, probe)
        before = self.stages.all[stage.number - 2].final if stage.number > 1 else None
        start = before if before is not None else self.plain.factor(first, first, probe) if first else 1.0
        return stage.final + (start - stage.final) * (1 - (step - stage.first) / stage.steps)

    def _begin(self) -> int:
        """The first step that does not follow the plain schedule."""
        return next((stage.first for stage in self.stages.all if stage.final is not None), self.stages.steps)
