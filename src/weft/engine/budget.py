"""One byte budget for all decode state: how it is divided among rows, pages and snapshots."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.errors import UserError
from weft.nn import Arena
from weft.nn.pages import RESERVED

CPU_SHARE, GPU_SHARE = 0.5, 0.85
UNKNOWN_MEMORY = 4 << 30
SNAPSHOT_SHARE = 4


@dataclass(frozen=True)
class MemoryPlan:
    """What a budget allows.

    rows            sequences at a time, as many as were asked for or as can have their state of constant size.
    pages           of state that grows; 0 for a model without any.
    snapshot_bytes  for copies of state of constant size, which the prefix cache needs.
    """

    rows: int
    pages: int
    snapshot_bytes: int


def plan_memory(arena: Arena, rows: int, context: int, memory: int) -> MemoryPlan:
    """Divide `memory` bytes among up to `rows` sequences of `context` tokens: at most half to what every row keeps for itself, a quarter
    of the rest to snapshots where the model needs them, the rest to pages. Raises UserError where not even one row and one page fit.
    """
    page_bytes, row_bytes = arena.page_bytes, arena.row_bytes(context)
    least = row_bytes + (1 + RESERVED) * page_bytes
    if memory < least:
        raise UserError(f"{memory} bytes of memory are allowed for decode state, and this model needs at least {least}; allow more.")
    if row_bytes:
        rows = min(rows, max(1, memory // 2 // row_bytes))
    rest = memory - rows * row_bytes
    snapshot_bytes = 0 if row_bytes == 0 else rest // SNAPSHOT_SHARE if page_bytes else rest
    pages = (rest - snapshot_bytes) // page_bytes - RESERVED if page_bytes else 0
    if page_bytes and pages < 1:
        pages, snapshot_bytes = 1, 0
    return MemoryPlan(rows, pages, snapshot_bytes)


def default_memory(device: torch.device) -> int:
    """Bytes for decode state where nobody says how many: half of the memory that is available, of a GPU's 85%."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(CPU_SHARE * available_memory())


def available_memory() -> int:
    """Bytes of main memory that can be taken now: what the system says, or what is left of the limit this process runs under."""
    found = [value for value in (_meminfo(), _cgroup(), _physical()) if value is not None]
    return min(found, default=UNKNOWN_MEMORY)


def _meminfo() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError):
        return None


def _cgroup() -> int | None:
    """What is left of a container's limit. Cached files count as used there, but are given up before anything fails."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))  # "max" where there is none
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, limit - used + int(stat.get("file", "0")))
    except (OSError, ValueError):
        return None


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
