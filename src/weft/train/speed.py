"""How fast a machine is and how well a run uses it."""

import resource
import sys
import time
from dataclasses import dataclass

import torch

SIZES = {"cpu": 1024, "mps": 2048, "cuda": 8192}  # large enough to reach the device's pace, small enough to take no time
SECONDS = 0.3


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of several square matrix products, measured now.

    It stands for the machine's peak in MFU: what its own library reaches with the threads this process has, not a data sheet's figure.
    """
    size = SIZES.get(device.type, 1024)
    generator = torch.Generator(device).manual_seed(0)  # its own: a run's random numbers must not depend on being measured
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        before = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - before)
    return 2 * size**3 / min(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
