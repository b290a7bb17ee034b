"""Views: the only code that knows how a growing leaf of state lies in memory.

A view writes this pass's entries and reads everything visible back as `(values, absolute key positions)`, so that one mask rule
serves every layout. Values are [B, K, *leaf shape]; positions are int64 [B, K], negative where a slot holds nothing. A view with a
`decoded` dtype keeps its entries in 8 bits (`weft.nn.state_codes`) and gives them back in that dtype.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.nn.pages import PADDING
from weft.nn.state_codes import decode, encode
from weft.nn.step import Step


class Entries(NamedTuple):
    """Where a kernel that works in place finds the entries [heads, width] of a leaf in its buffer, in units of one head's vector.

    head_stride  elements between two heads of one entry.
    starts       int64 [B, K], where each entry begins.
    positions    int64 [B, K], as `read` gives them.
    slots        int64 [B, T], where this pass's entries go.
    """

    head_stride: int
    starts: Tensor
    positions: Tensor
    slots: Tensor


class View(Protocol):
    """What a mixer may do with a growing leaf."""

    buffer: Tensor

    def locate(self, step: Step) -> Entries:
        """What a kernel needs to do the work of `write` and `read` by itself; for leaves of shape [heads, width]. Leaves of one layout
        and shape share it."""

    def write(self, new: Tensor, step: Step) -> None:
        """Store entries [B, T, *shape] at this step's positions; padding goes to a slot nobody reads."""

    def read(self, step: Step) -> tuple[Tensor, Tensor]:
        """Everything a query of this step may see, its own entries included."""


class _Slots:
    """Shared by dense and ring: a buffer [rows, *lead, capacity + 1, last] whose final slot collects padding.

    The token axis stands before the last one, so that keys and values lie head by head and attention's batched products read
    them in place. That needs the whole buffer, without a gap between rows: the final slot is read too, as one that is empty.
    """

    def __init__(self, buffer: Tensor, token_axis: int, decoded: torch.dtype | None = None) -> None:
        self.buffer, self.entries, self.decoded = buffer, buffer.movedim(token_axis, 1), decoded
        self.capacity = self.entries.shape[1] - 1
        self.dtype, self._key = buffer.dtype, f"{type(self).__name__} entries {tuple(buffer.shape)}"

    def _store(self, new: Tensor, step: Step, slots: Tensor) -> None:
        index = torch.where(step.valid, slots, self.capacity)
        self.entries.index_put_((_rows(step)[:, None], index), _stored(new, self.entries.dtype, self.decoded))

    def _locate(self, step: Step, slots: Tensor, positions: Tensor) -> Entries:
        heads, capacity, width = self.buffer.shape[1:]
        row = _rows(step)[:, None] * (heads * capacity)
        index = row + torch.arange(capacity, device=row.device)
        return Entries(capacity * width, index, positions, row + torch.where(step.valid, slots, self.capacity))

    def _load(self, step: Step) -> Tensor:
        entries = self.entries[: step.start.shape[0]] if step.rows is None else self.entries[step.rows]
        return entries if self.decoded is None else decode(entries, self.decoded)


class Dense(_Slots):
    """Slot = position."""

    def write(self, new: Tensor, step: Step) -> None:
        self._store(new, step, step.positions)

    def read(self, step: Step) -> tuple[Tensor, Tensor]:
        return self._load(step), step.once(("dense", self.capacity + 1), lambda: _filled(step, self.capacity + 1))

    def locate(self, step: Step) -> Entries:
        return step.once(self._key, lambda: self._locate(step, step.positions, _filled(step, self.capacity + 1)))


class Ring(_Slots):
    """The first `pinned` slots hold the first positions for ever. After them slot = position mod R, with R = window - 1 + max_chunk: room
    for a chunk that may yet be rejected."""

    def __init__(self, buffer: Tensor, token_axis: int, decoded: torch.dtype | None = None, pinned: int = 0) -> None:
        super().__init__(buffer, token_axis, decoded)
        self.pinned = min(pinned, self.capacity)
        self._turns = max(1, self.capacity - self.pinned)
        self._key += f" pinned {self.pinned}"

    def write(self, new: Tensor, step: Step) -> None:
        self._store(new, step, self._slots(step))

    def read(self, step: Step) -> tuple[Tensor, Tensor]:
        return self._load(step), step.once(("ring", self.capacity, self.pinned), lambda: self._newest(step))

    def locate(self, step: Step) -> Entries:
        return step.once(self._key, lambda: self._locate(step, self._slots(step), self._newest(step)))

    def _slots(self, step: Step) -> Tensor:
        if not self.pinned:
            return step.positions % self.capacity
        turning = self.pinned + (step.positions - self.pinned) % self._turns
        return torch.where(step.positions < self.pinned, step.positions, turning)

    def _newest(self, step: Step) -> Tensor:
        """The newest position that each slot may hold; negative means the slot was never written."""
        last = (step.start + step.n_new - 1)[:, None]
        slots = torch.arange(self.capacity, device=last.device)
        if not self.pinned:
            newest = last - (last - slots) % self.capacity
        else:
            turn = last - self.pinned - (last - slots) % self._turns  # counted from the first position that is not pinned
            turning = torch.where(turn < 0, -1, turn + self.pinned)
            newest = torch.where(slots < self.pinned, torch.where(slots <= last, slots, -1), turning)
        return F.pad(newest, (0, 1), value=-1)


class Paged:
    """Entries in pages, found through the step's table.

    pool   [pages, page, *shape], contiguous: entry `position` of a row lies at pool[table[row, position // page], position % page].
    page   entries a page.

    `step.table` [B, columns] has a column for every page that a token of this pass may read or write, and at most as many more as the
    caller's buckets add; unused columns say 0, a page of zeros. What lies at or beyond start + n_new is to be masked. `read` gathers a
    copy: the reference that a kernel working in place has to equal.
    """

    def __init__(self, pool: Tensor, decoded: torch.dtype | None = None) -> None:
        self.pool, self.decoded = pool, decoded
        self.page, self.dtype = pool.shape[1], pool.dtype
        self.buffer, self._key = pool, f"paged entries {tuple(pool.shape)}"
        self._entries = pool.flatten(0, 1)

    def write(self, new: Tensor, step: Step) -> None:
        slots = step.once(("slots", self.page), lambda: page_slots(step, self.page))
        self._entries.index_copy_(0, slots, _stored(new.flatten(0, 1), self.pool.dtype, self.decoded))

    def read(self, step: Step) -> tuple[Tensor, Tensor]:
        assert step.table is not None
        values = self.pool[step.table].flatten(1, 2)
        values = values if self.decoded is None else decode(values, self.decoded)
        if values.ndim > 3:  # head by head, as the other layouts have it: the products must not see how many rows there are
            values = values.movedim(1, -2).contiguous().movedim(-2, 1)
        capacity = values.shape[1]
        return values, step.once(("dense", capacity), lambda: _filled(step, capacity))

    def locate(self, step: Step) -> Entries:
        return step.once(self._key, lambda: self._locate(step))

    def _locate(self, step: Step) -> Entries:
        assert step.table is not None
        heads, width = self.pool.shape[2:]
        offsets = torch.arange(self.page, device=self.pool.device)
        index = (step.table[:, :, None] * self.page + offsets).flatten(1)
        slots = page_slots(step, self.page).view(step.positions.shape)
        return Entries(width, index * heads, _filled(step, index.shape[1]), slots * heads)


def _stored(new: Tensor, dtype: torch.dtype, decoded: torch.dtype | None) -> Tensor:
    return new.to(dtype) if decoded is None else encode(new)


def _rows(step: Step) -> Tensor:
    return torch.arange(step.start.shape[0], device=step.start.device) if step.rows is None else step.rows


def page_slots(step: Step, page: int) -> Tensor:
    """Where this pass's entries go in a paged leaf, [B * T] int64: page number * page + offset; padding goes to page 1."""
    assert step.table is not None
    column = (step.positions // page).clamp(max=step.table.shape[1] - 1)
    return torch.where(step.valid, step.table.gather(1, column) * page + step.positions % page, PADDING * page).flatten()


def _filled(step: Step, capacity: int) -> Tensor:
    """Positions [B, capacity] of slots in order, -1 from the first unwritten one on."""
    slots = torch.arange(capacity, device=step.start.device)
    return torch.where(slots < (step.start + step.n_new)[:, None], slots, -1)
