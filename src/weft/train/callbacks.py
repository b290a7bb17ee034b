"""Those who watch a run. They are told what happened and cannot change what will."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from weft.errors import UserError
from weft.train.history import Row
from weft.train.speed import Pace
from weft.train.watched import LOSS, Watched


class Callback:
    """A watcher that does nothing; override what you want to see. All numbers are copies."""

    def on_start(self, card: dict[str, Any]) -> None:
        """Training begins or goes on."""

    def on_log(self, rows: Sequence[Row], pace: Pace) -> None:
        """Some steps are done: a row each, oldest first."""

    def on_evaluate(self, row: Row) -> None:
        """The held-out data was looked at."""

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint or the best weights were written."""

    def on_end(self, card: dict[str, Any]) -> None:
        """Training is over or was interrupted."""


class ProgressLine(Callback):
    """The figures that an objective has `watched`, speed and time left on one line that is written over in a terminal, and every ten
    seconds on a new one elsewhere. Where a terminal is too narrow, speed and held-out figures are left out first."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.in_place = self.stream.isatty()
        self._watched: Sequence[Watched] = (LOSS,)
        self._held_out: Row = {}
        self._shown: tuple[Sequence[Row], Pace] | None = None
        self._last = float("-inf")

    def on_start(self, card: dict[str, Any]) -> None:
        model, run = card["model"], card["run"]
        self._watched = [Watched(**each) for each in card["watched"]]
        length = f"{run['steps']} steps" if run["steps"] else f"{run['minutes']:g} minutes"
        begun = f", from step {run['resumed_from']}" if run["resumed_from"] else ""
        self._say(
            f"{model['parameters']:,} parameters, {run['tokens_per_step']:,} tokens a step, {length}{begun}, on {run['device']}", True
        )

    def on_log(self, rows: Sequence[Row], pace: Pace) -> None:
        now = time.monotonic()
        if not rows or (not self.in_place and now - self._last < 10 and pace.step != pace.total):
            return
        self._last, self._shown = now, (rows, pace)
        share = f"{pace.step}/{pace.total}" if pace.total else f"{pace.step}"
        left = "measuring the pace" if pace.seconds_left is None else f"{clock(pace.seconds_left)} left"
        parts = [f"step {share}", *self._training(rows[-10:]), *self._of_held_out()]
        low, high = rows[-1].get("expert_share_min"), rows[-1].get("expert_share_max")
        if low is not None:
            parts.append(f"experts {low:.2f} to {high:.2f} of fair")
        parts += [f"{pace.tokens_per_s:,.0f} tok/s", f"MFU {pace.mfu:.0%}", left]
        while self.in_place and len("  ".join(parts)) >= shutil.get_terminal_size().columns and len(parts) > 3:
            del parts[-2]  # a longer line would wrap, and could not be written over
        self._say("  ".join(parts), not self.in_place)

    def _training(self, rows: Sequence[Row]) -> list[str]:
        """The first figure, and those that held-out data does not have."""
        first = self._watched[0]
        shown = [each for each in self._watched if each is first or f"valid_{each.name}" not in self._held_out]
        means = [(each, each.mean(rows)) for each in shown]
        return [f"{each.title} {each.write(mean)}" for each, mean in means if mean is not None]

    def _of_held_out(self) -> list[str]:
        values = [(each, self._held_out[f"valid_{each.name}"]) for each in self._watched if f"valid_{each.name}" in self._held_out]
        shown = [each.write(value) if each is self._watched[0] else f"{each.title} {each.write(value)}" for each, value in values]
        if "valid_bits_per_byte" in self._held_out:
            shown.append(f"{self._held_out['valid_bits_per_byte']:.3f} bits/byte")
        return [f"held-out {shown[0]}" + (f" ({', '.join(shown[1:])})" if shown[1:] else "")] if shown else []

    def on_evaluate(self, row: Row) -> None:
        self._held_out = row
        if self.in_place and self._shown is not None:
            self.on_log(*self._shown)

    def on_end(self, card: dict[str, Any]) -> None:
        if self.in_place:
            self.stream.write("\n")
            self.stream.flush()

    def _say(self, text: str, newline: bool) -> None:
        self.stream.write(("\r\x1b[K" if self.in_place else "") + text + ("\n" if newline else ""))
        self.stream.flush()


class TensorBoard(Callback):
    """Every number of every row as a scalar; needs the `tensorboard` extra."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard is true, which needs tensorboard; install it with: pip install 'weft[tensorboard]', or set it to false."
            ) from None
        self._make: Callable[[], Any] = partial(SummaryWriter, str(folder))
        self._writer: Any = None

    def on_log(self, rows: Sequence[Row], pace: Pace) -> None:
        for row in rows:
            self._write(row)

    def on_evaluate(self, row: Row) -> None:
        self._write(row)

    def on_end(self, card: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, row: Row) -> None:
        self._writer = self._writer or self._make()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])


def clock(seconds: float) -> str:
    """1:02:03, 4:05 or 12s."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}" if minutes else f"{whole}s"
