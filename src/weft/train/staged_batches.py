"""The batches of a run in stages."""

from collections.abc import Iterator, Sequence
from typing import Any

from weft.train.job import BatchSource
from weft.train.objective import Batch
from weft.train.stages import Stage, Stages


class StagedBatches:
    """Batches of a run in stages, one source a stage.

    held_out  gives what the run is measured on, in every stage the same.

    A stage that draws on the same data as an earlier one goes on about where that one stopped: as far into its own order of rows as the
    earlier ones together have read.
    """

    def __init__(self, stages: Stages, sources: Sequence[BatchSource], held_out: BatchSource) -> None:
        self.stages, self.sources, self.held_out = stages, tuple(sources), held_out
        self.valid, self.length = held_out.valid, held_out.length
        self._skipped = [self._read_before(stage) for stage in stages.all]

    def _read_before(self, stage: Stage) -> int:
        """Steps of a stage's own size that earlier stages have read of its data."""
        own = self.sources[stage.number - 1]
        earlier = (each for each in self.stages.all[: stage.number - 1] if each.settings.data == stage.settings.data)
        read = sum(each.steps * self.sources[each.number - 1].tokens_per_batch for each in earlier)
        return -(-read // own.tokens_per_batch)

    @property
    def tokens_per_batch(self) -> int:
        return self.held_out.tokens_per_batch

    def sizes(self, steps: int) -> list[tuple[int, int, int]]:
        """Of the first `steps` steps: (steps, tokens of a batch, tokens of a row), a stage an entry."""
        spans = [(min(steps, stage.end) - stage.first, self.sources[stage.number - 1]) for stage in self.stages.all if stage.first < steps]
        return [(count, source.tokens_per_batch, source.length) for count, source in spans]

    def batch(self, step: int) -> Batch:
        stage = self.stages.at(step)
        return self.sources[stage.number - 1].batch(step - stage.first + self._skipped[stage.number - 1])

    def validation(self, max_batches: int | None = None) -> Iterator[Batch]:
        return self.held_out.validation(max_batches)

    def report(self, steps: int | None = None) -> list[dict[str, Any]]:
        """The data table, a stage after the other; epochs count from where the stage begins."""
        done, table = self.stages.steps if steps is None else steps, []
        for stage, source, skipped in zip(self.stages.all, self.sources, self._skipped, strict=True):
            count = min(done, stage.end) - stage.first
            if count > 0:
                before = {each["source"]: each["epochs"] for each in source.report(skipped)}
                for each in source.report(skipped + count):
                    epochs = each["epochs"] - before[each["source"]]
                    table.append({**each, "source": f"{stage.name}: {each['source']}", "epochs": epochs})
        return table

    def describe(self) -> dict[str, Any]:
        return {
            str(stage.number): {"first": stage.first, "end": stage.end, **source.describe()}
            for stage, source in zip(self.stages.all, self.sources, strict=True)
        }
