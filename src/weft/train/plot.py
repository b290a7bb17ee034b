"""The curves of a run as a picture."""

import io
from collections.abc import Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from weft.files import atomic_write
from weft.train.history import Row
from weft.train.watched import Watched

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 1000  # most points of a training curve: neighbours are averaged


def plot_run(rows: Sequence[Row], watched: Sequence[Watched], path: Path, title: str = "") -> bool:
    """Draw figures of training and of held-out data against steps into a PNG, side by side; False where matplotlib is not installed.
    What a run has no figures of is left out."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [watched[0], *(each for each in watched[1:] if each.mean(rows) is not None)]
    figure = Figure(figsize=(7 if len(shown) == 1 else 5 * len(shown), 4), layout="constrained")
    for axes, each in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _draw(axes, rows, each)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(path, picture.getvalue())
    return True


def _draw(axes: "Axes", rows: Sequence[Row], watched: Watched) -> None:
    """One figure; of the several updates that a step may have, their mean."""
    found = (row for row in rows if row.get(watched.name) is not None)
    steps = [list(updates) for _, updates in groupby(found, key=itemgetter("step"))]
    held_out = [row for row in rows if row.get(f"valid_{watched.name}") is not None]
    size = max(1, len(steps) // POINTS)
    groups = [list(chain(*steps[start : start + size])) for start in range(0, len(steps), size)]
    means = [mean for group in groups if (mean := watched.mean(group)) is not None]
    axes.plot([group[-1]["step"] for group in groups], means, label="training")
    if held_out:
        axes.plot([row["step"] for row in held_out], [row[f"valid_{watched.name}"] for row in held_out], marker="o", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel(", ".join(filter(None, (watched.title, watched.unit))))
    axes.legend()
    axes.grid(alpha=0.3)
