"""How fast a machine is, measured: what training and generation are compared with."""

import time
from collections.abc import Callable

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
    return 2 * size**3 / _best(lambda: a @ a, device)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over 256 MB reads, measured now."""
    x = torch.ones(2**26, device=device)
    return x.numel() * x.element_size() / _best(x.sum, device)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """The least of several times, in seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        before = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - before)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
