"""How the C library's allocator treats memory that is freed: on a CPU, tensors come from it."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters, from malloc.h
_LARGEST = (1 << 30, 32 << 20)  # bytes; glibc before 2.35 allows the second at most


def keep_freed_memory() -> bool:
    """Let large blocks stay with the process when they are freed, for the next step to take again; True where that could be told.

    By default glibc gives every block over a threshold back to the system, and a training step frees and takes the same blocks again
    and again: each time the system clears every page. That is 5% of a step of a 5M-parameter model on two cores, up to 16% where
    scores of attention are held whole. The peak of memory does not change; what is not needed any more is given back later.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    told = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(told and mallopt(_TRIM_THRESHOLD, _LARGEST[0]))
