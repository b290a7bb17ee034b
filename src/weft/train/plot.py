"""The loss curve of a run as a picture."""

from pathlib import Path

from weft.files import atomic_write
from weft.train.history import Row

POINTS = 1000  # most points of the training curve: neighbours are averaged


def plot_loss(rows: list[Row], path: Path, title: str = "") -> bool:
    """Draw training and held-out loss against steps into a PNG; False where matplotlib is not installed."""
    try:
        import io

        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "valid_loss" in row]
    size = max(1, len(steps) // POINTS)
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [group[-1]["step"] for group in groups], [sum(row["loss"] for row in group) / len(group) for group in groups], label="training"
    )
    if held_out:
        axes.plot([row["step"] for row in held_out], [row["valid_loss"] for row in held_out], marker="o", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(path, picture.getvalue())
    return True
