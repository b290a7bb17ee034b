"""Averages of the checkpoints of a run."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from weft.errors import UserError
from weft.merge import combine
from weft.merge.models import Merged, Models, average

SNAPSHOTS = "snapshots"  # of a run's folder: models by the step they were saved at


def snapshots(run: Path) -> list[Path]:
    """The models that a run has kept, in the order of their steps."""
    return sorted((path for path in (run / SNAPSHOTS).glob("step-*") if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))


def average_checkpoints(
    given: Sequence[str | Path], out: Path, last: int | None = None, decay: float | None = None, dtype: torch.dtype | None = None
) -> Merged:
    """Write the mean of checkpoints in the order they were made; a run's folder stands for the snapshots in it.

    last   of how many, from the end; None is all.      decay  each weighs so many times the one after it; None is 1.
    """
    paths: list[str | Path] = []
    for each in given:
        found = snapshots(Path(each))
        if not found and (Path(each) / "run.json").is_file():
            raise UserError(f"the run {each} has kept no snapshots; train it with average.count=8, or give the checkpoints one by one.")
        paths += found or [each]
    if last is not None and not 1 <= last <= len(paths):
        raise UserError(f"--last is {last}, but there are {len(paths)} checkpoints; give 1 to {len(paths)}.")
    if decay is not None and not (0 < decay <= 1 and math.isfinite(decay)):
        raise UserError(f"--decay is {decay:g}; give a factor above 0 and at most 1.")
    chosen = paths[-last:] if last is not None else paths
    method = "average" if decay is None else f"average with decay {decay:g}"
    return average(Models(chosen), combine.decaying(len(chosen), decay or 1.0), out, method, dtype)
