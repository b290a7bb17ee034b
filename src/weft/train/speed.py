"""How well a run uses its machine."""

import resource
import sys
import time
from dataclasses import dataclass

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the GPU, or of this process where the CPU trains."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@dataclass(frozen=True)
class Pace:
    """What a progress line says about speed.

    step, total      steps done, and of the run (None while a time budget is being measured).
    tokens_per_s     positions of all processes a second since the last report.
    mfu              share of the measured peak that training's 3 * forward FLOPs amount to (Chowdhery et al. 2022, appendix B);
                     recomputation under gradient checkpointing is not counted as work.
    seconds_left     at this pace, or None.
    """

    step: int
    total: int | None
    tokens_per_s: float
    mfu: float
    seconds_left: float | None


class Stopwatch:
    """Seconds of training alone: stopped while the run evaluates or saves."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._held = 0.0

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self._held += time.perf_counter() - self._since
            self._since = None

    def lap(self) -> float:
        """Seconds that it ran since the last lap."""
        running = self._since is not None
        self.stop()
        seconds, self._held = self._held, 0.0
        if running:
            self.start()
        return seconds
