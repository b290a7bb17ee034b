"""Checkpoints kept near the end of a run, and their mean."""

from pathlib import Path

from weft.merge.checkpoints import SNAPSHOTS, average_checkpoints
from weft.train.checkpoint import save_weights
from weft.train.job import Job

AVERAGE = "average"
OVER = 0.1  # share of a run without stages


class Averaging:
    """What `average` in a recipe asks for.

    Which steps are kept follows from the length of the run, and what is kept from the run alone: a run that is killed writes the same
    snapshots once more, and the same mean.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.settings = job, job.average

    def steps(self, total: int) -> list[int]:
        """The steps after which weights are kept, the last of the run among them; fewer than asked for where there are no more."""
        if self.settings is None:
            return []
        span = round(self.settings.over * total) if self.settings.over is not None else self._usual(total)
        count = max(1, min(self.settings.count, span))
        return [total - span * index // count for index in reversed(range(count))]

    def _usual(self, total: int) -> int:
        return self.job.stages.all[-1].steps if self.job.stages is not None else round(OVER * total)

    def due(self, step: int, total: int | None, over: bool = False) -> bool:
        """Whether the weights after this step are kept. Where the run is `over` they are, though it was to have more steps."""
        return self.settings is not None and total is not None and (over or step in self.steps(total))

    def keep(self, step: int) -> None:
        """Save the policy as it is."""
        folder = self.job.folder
        if folder is not None:
            save_weights(self._path(folder.path, step), self.job.policy, self.job.tokenizer, self.job.family, {"step": step})

    def finish(self, last: int, total: int) -> Path:
        """Write the mean of what was kept of a run of `total` steps that ended after `last`; returns its folder."""
        out = self.job.out / AVERAGE
        if self.job.folder is not None and self.settings is not None:
            kept = [*(step for step in self.steps(total) if step < last), last]
            average_checkpoints([self._path(self.job.out, step) for step in kept], out, decay=self.settings.decay)
        self.job.world.wait()
        return out

    @staticmethod
    def _path(out: Path, step: int) -> Path:
        return out / SNAPSHOTS / f"step-{step}"
