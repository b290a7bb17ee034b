"""How the C library's allocator treats memory that is freed: on a CPU, tensors come from it."""

import ctypes
import os
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters, from malloc.h
_LARGEST = (1 << 30, 32 << 20)  # bytes; glibc before 2.35 allows the second at most
_RESIDENT = Path("/proc/self/statm")


def keep_freed_memory() -> bool:
    """Let large blocks stay with the process when they are freed, for the next step to take again; True where that could be told.

    By default glibc gives every block over a threshold back to the system, and a training step frees and takes the same blocks again
    and again: each time the system clears every page. That is 5% of a step of a 5M-parameter model on two cores, up to 16% where
    scores of attention are held whole. What `Heap` says is given back now and then.
    """
    library = _glibc()
    if library is None:
        return False
    told = any(library.mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(told and library.mallopt(_TRIM_THRESHOLD, _LARGEST[0]))


class Heap:
    """Gives memory back to the system that lies between blocks in use.

    Steps whose tensors have other sizes than those before, as records of varying length make them, leave holes that nothing fits into,
    and the process grows from step to step: without this to twice and three times what a step takes. A hole's pages are given back
    when the process is `GROWTH` times as large as it was after the step that followed the last time.
    """

    GROWTH = 1.1

    def __init__(self) -> None:
        self._library = _glibc()
        self._settled: int | None = None  # bytes

    def after_step(self) -> bool:
        """Look at the process's size; True where memory was given back."""
        if self._library is None:
            return False
        now = resident()
        if self._settled is None:
            self._settled = now
        if now <= self.GROWTH * self._settled:
            return False
        self._library.malloc_trim(0)
        self._settled = None
        return True


def resident() -> int:
    """Bytes of this process in memory; Linux only."""
    return int(_RESIDENT.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is one with these functions."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (OSError, AttributeError):  # another C library
        return None
