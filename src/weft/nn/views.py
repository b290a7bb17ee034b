"""Views: the only code that knows how a growing leaf of state lies in memory.

A view writes this pass's entries and reads everything visible back as `(values, absolute key positions)`, so that one mask rule
serves every layout. Values are [B, K, *leaf shape]; positions are int64 [B, K], negative where a slot holds nothing.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.nn.pages import PADDING
from weft.nn.step import Step


class View(Protocol):
    """What a mixer may do with a growing leaf."""

    def write(self, new: Tensor, step: Step) -> None:
        """Store entries [B, T, *shape] at this step's positions; padding goes to a slot nobody reads."""

    def read(self, step: Step) -> tuple[Tensor, Tensor]:
        """Everything a query of this step may see, its own entries included."""


class _Slots:
    """Shared by dense and ring: a buffer [rows, *lead, capacity + 1, last] whose final slot collects padding.

    The token axis stands before the last one, so that keys and values lie head by head and attention's batched products read
    them in place. That needs the whole buffer, without a gap between rows: the final slot is read too, as one that is empty.
    """

    def __init__(self, buffer: Tensor, token_axis: int) -> None:
        self.entries = buffer.movedim(token_axis, 1)
        self.capacity = self.entries.shape[1] - 1

    def _store(self, new: Tensor, step: Step, slots: Tensor) -> None:
        rows = torch.arange(new.shape[0], device=new.device) if step.rows is None else step.rows
        index = torch.where(step.valid, slots, self.capacity)
        self.entries.index_put_((rows[:, None], index), new.to(self.entries.dtype))

    def _load(self, step: Step) -> Tensor:
        return self.entries[: step.start.shape[0]] if step.rows is None else self.entries[step.rows]


class Dense(_Slots):
    """Slot = position."""

    def write(self, new: Tensor, step: Step) -> None:
        self._store(new, step, step.positions)

    def read(self, step: Step) -> tuple[Tensor, Tensor]:
        return self._load(step), step.once(("dense", self.capacity + 1), lambda: _filled(step, self.capacity + 1))


class Ring(_Slots):
    """Slot = position mod capacity, with capacity = window - 1 + max_chunk: room for a chunk that may yet be rejected."""

    def write(self, new: Tensor, step: Step) -> None:
        self._store(new, step, step.positions % self.capacity)

    def read(self, step: Step) -> tuple[Tensor, Tensor]:
        return self._load(step), step.once(("ring", self.capacity), lambda: self._newest(step))

    def _newest(self, step: Step) -> Tensor:
        """The newest position congruent to each slot; negative means the slot was never written."""
        last = (step.start + step.n_new - 1)[:, None]
        slots = torch.arange(self.capacity, device=last.device)
        return F.pad(last - (last - slots) % self.capacity, (0, 1), value=-1)


class Paged:
    """Entries in pages, found through the step's table.

    pool   [pages, page, *shape], contiguous: entry `position` of a row lies at pool[table[row, position // page], position % page].
    page   entries a page.

    `step.table` [B, columns] has a column for every page that a token of this pass may read or write, and at most as many more as the
    caller's buckets add; unused columns say 0, a page of zeros. What lies at or beyond start + n_new is to be masked. `read` gathers a
    copy: the reference that a kernel working in place has to equal.
    """

    def __init__(self, pool: Tensor) -> None:
        self.pool = pool
        self.page = pool.shape[1]
        self._entries = pool.flatten(0, 1)

    def write(self, new: Tensor, step: Step) -> None:
        slots = step.once(("slots", self.page), lambda: page_slots(step, self.page))
        self._entries.index_copy_(0, slots, new.flatten(0, 1).to(self.pool.dtype))

    def read(self, step: Step) -> tuple[Tensor, Tensor]:
        assert step.table is not None
        values = self.pool[step.table].flatten(1, 2)
        if values.ndim > 3:  # head by head, as the other layouts have it: the products must not see how many rows there are
            values = values.movedim(1, -2).contiguous().movedim(-2, 1)
        capacity = values.shape[1]
        return values, step.once(("dense", capacity), lambda: _filled(step, capacity))


def page_slots(step: Step, page: int) -> Tensor:
    """Where this pass's entries go in a paged leaf, [B * T] int64: page number * page + offset; padding goes to page 1."""
    assert step.table is not None
    column = (step.positions // page).clamp(max=step.table.shape[1] - 1)
    return torch.where(step.valid, step.table.gather(1, column) * page + step.positions % page, PADDING * page).flatten()


def _filled(step: Step, capacity: int) -> Tensor:
    """Positions [B, capacity] of slots in order, -1 from the first unwritten one on."""
    slots = torch.arange(capacity, device=step.start.device)
    return torch.where(slots < (step.start + step.n_new)[:, None], slots, -1)
