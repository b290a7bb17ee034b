"""Ctrl-C as a wish: the step is finished and saved before the run stops."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """A context in which SIGINT and SIGTERM set `wanted` and say so; a second one ends the process as it always does."""

    def __init__(self, quiet: bool = False) -> None:
        self.wanted, self.quiet = False, quiet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._put_back()
        if not self.quiet:
            print("\nweft: finishing this step and saving; once more stops at once.", file=sys.stderr, flush=True)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
