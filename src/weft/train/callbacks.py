"""Those who watch a run. They are told what happened and cannot change what will."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from weft.errors import UserError
from weft.train.history import Row
from weft.train.speed import Pace


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
    """Loss, speed and time left on one line that is written over in a terminal, and every ten seconds on a new one elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.in_place = self.stream.isatty()
        self._held_out = ""
        self._last = float("-inf")

    def on_start(self, card: dict[str, Any]) -> None:
        model, run = card["model"], card["run"]
        length = f"{run['steps']} steps" if run["steps"] else f"{run['minutes']:g} minutes"
        begun = f", from step {run['resumed_from']}" if run["resumed_from"] else ""
        self._say(
            f"{model['parameters']:,} parameters, {run['tokens_per_step']:,} tokens a step, {length}{begun}, on {run['device']}", True
        )

    def on_log(self, rows: Sequence[Row], pace: Pace) -> None:
        now = time.monotonic()
        if not rows or (not self.in_place and now - self._last < 10 and pace.step != pace.total):
            return
        self._last = now
        share = f"{pace.step}/{pace.total}" if pace.total else f"{pace.step}"
        left = "measuring the pace" if pace.seconds_left is None else f"{clock(pace.seconds_left)} left"
        loss = sum(row["loss"] for row in rows[-10:]) / len(rows[-10:])
        speed = f"{pace.tokens_per_s:,.0f} tok/s  MFU {pace.mfu:.0%}"
        low, high = rows[-1].get("expert_share_min"), rows[-1].get("expert_share_max")
        experts = "" if low is None else f"  experts {low:.2f} to {high:.2f} of fair"
        self._say(f"step {share}  loss {loss:.4f}{self._held_out}{experts}  {speed}  {left}", not self.in_place)

    def on_evaluate(self, row: Row) -> None:
        bits = row.get("valid_bits_per_byte")
        self._held_out = f"  held-out {row['valid_loss']:.4f}" + (f" ({bits:.3f} bits/byte)" if bits is not None else "")

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
