"""Rows of decode state, and what runs in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.nn import Arena, Model, Runner


@dataclass(eq=False)
class Lane:
    """One row at work: `ids` are the prompt and all that was generated, the first `fed` of them are in the row's state."""

    owner: Any
    row: int
    ids: list[int]
    fed: int = 0

    @property
    def pending(self) -> int:
        return len(self.ids) - self.fed


class Lanes:
    """An arena that grows and shrinks with the work, its rows lent to lanes.

    limit    most rows at a time.
    context  longest sequence.
    reuse    a row that was given back keeps its state; a prompt that begins with the same tokens continues from there.
    """

    def __init__(self, model: Model, limit: int, chunk: int, context: int, reuse: bool) -> None:
        self.model, self.limit, self.context, self.reuse = model, limit, context, reuse
        self.chunk = min(chunk, context)
        self.active: list[Lane] = []
        self._held: dict[int, list[int]] = {}
        self._adopt(Arena(model, 1, self._capacity(1), self.chunk))

    def _adopt(self, arena: Arena) -> None:
        self.arena = arena
        self._runner = Runner(self.model, arena)

    @property
    def available(self) -> int:
        return self.limit - len(self.active)

    def take(self, owner: Any, ids: Sequence[int], waiting: int = 1) -> Lane:
        """Lend a row to a prompt. `waiting` lanes are about to be taken, this one included: rows are made for all of them at once."""
        assert self.available > 0
        wanted = min(self.limit, len(self.active) + waiting)
        if wanted > self.arena.rows:
            self._resize(wanted, self.arena.max_len, list(range(self.arena.rows)))
        busy = {lane.row for lane in self.active}
        free = [row for row in range(self.arena.rows) if row not in busy]
        usable = {row: self._usable(row, ids) for row in free}
        # Of rows that serve equally well take one that holds nothing, so that what others hold can be used again.
        row = max(free, key=lambda row: (usable[row], row not in self._held, -row))
        self._held.pop(row, None)
        if usable[row]:
            self.arena.lens[row] = usable[row]
        else:
            self.arena.reset([row])
        lane = Lane(owner, row, list(ids), usable[row])
        self.active.append(lane)
        return lane

    def _usable(self, row: int, ids: Sequence[int]) -> int:
        """How many tokens of the prompt a free row's state already covers: at most all but one, whose logits are wanted."""
        held = self._held.get(row, [])
        common = 0
        for ours, theirs in zip(ids[:-1], held, strict=False):
            if ours != theirs:
                break
            common += 1
        back = len(held) - common
        for leaf in self.arena.leaves.values():
            # A fixed state cannot go back, and a ring only until it has overwritten what its window would need.
            if back and (leaf.kind == "fixed" or (leaf.kind == "ring" and back > self.chunk)):
                return 0
        return common

    def give_back(self, lane: Lane) -> None:
        self.active.remove(lane)
        if self.reuse and not any(leaf.kind == "static" for leaf in self.arena.leaves.values()):
            self._held[lane.row] = lane.ids[: lane.fed]

    def scrub(self, lane: Lane) -> None:
        """Clear a row of numbers that are not finite: masked entries are multiplied by zero, and zero times infinity is not zero."""
        for name, buffer in self.arena.named_buffers():
            if name not in ("lens", "table"):
                buffer[lane.row] = 0

    def fork(self, lane: Lane, target: Lane) -> None:
        """Make a lane's state and tokens a copy of another's."""
        if lane is not target:
            self.arena.fork(lane.row, target.row)
            target.ids, target.fed = list(lane.ids), lane.fed

    def snapshot(self, lane: Lane) -> dict[Any, Tensor]:
        return self.arena.snapshot(lane.row)

    def restore(self, lane: Lane, copy: dict[Any, Tensor]) -> None:
        self._reserve(int(copy["lens"]))
        self.arena.restore(lane.row, copy)
        lane.fed = int(copy["lens"])

    def prime(self, lane: Lane, memory: Tensor) -> None:
        """Write the state of cross-attention from a memory [S, M]."""
        weight = self.model.embed.weight
        rows = torch.tensor([lane.row], device=weight.device)
        self.arena.prime(memory[None].to(weight), torch.tensor([memory.shape[0]], device=weight.device), rows)

    def feed_chunks(self, lanes: Sequence[Lane]) -> Tensor:
        """Feed each lane up to the next multiple of the chunk size, counted from its own start; logits [B, V] after its last token."""
        counts = [min(lane.pending, self.chunk - lane.fed % self.chunk) for lane in lanes]
        tokens = torch.zeros(len(lanes), max(counts), dtype=torch.long)
        for i, (lane, count) in enumerate(zip(lanes, counts, strict=True)):
            tokens[i, :count] = torch.tensor(lane.ids[lane.fed : lane.fed + count])
        self._reserve(max(lane.fed + count for lane, count in zip(lanes, counts, strict=True)))
        device = self.arena.lens.device
        rows = torch.tensor([lane.row for lane in lanes], device=device)
        logits: Tensor = self._runner(tokens.to(device), torch.tensor(counts, device=device), rows)
        for lane, count in zip(lanes, counts, strict=True):
            lane.fed += count
        return logits

    def feed_single(self, lanes: Sequence[Lane]) -> Tensor:
        """Feed one token to each lane; logits [B, V]. The whole arena runs, its other rows idle, so that no state is gathered."""
        tokens, counts = [[0]] * self.arena.rows, [0] * self.arena.rows
        self._reserve(1 + max(lane.fed for lane in lanes))
        for lane in lanes:
            tokens[lane.row], counts[lane.row] = [lane.ids[lane.fed]], 1
        device = self.arena.lens.device
        logits: Tensor = self._runner(torch.tensor(tokens, device=device), torch.tensor(counts, device=device))
        for lane in lanes:
            lane.fed += 1
        order = [lane.row for lane in lanes]
        return logits if order == list(range(self.arena.rows)) else logits[torch.tensor(order, device=device)]

    def _reserve(self, length: int) -> None:
        if length > self.arena.max_len:
            self._resize(self.arena.rows, self._capacity(length), list(range(self.arena.rows)))

    def shrink(self) -> None:
        """Drop idle rows where they are half of all or more: each costs a row's work at every token."""
        if self.reuse or 2 * len(self.active) > self.arena.rows or self.arena.rows == 1:
            return
        keep = [lane.row for lane in self.active]
        longest = max((lane.fed for lane in self.active), default=1)
        self._resize(max(1, len(keep)), self._capacity(longest), keep)
        for row, lane in enumerate(self.active):
            lane.row = row

    def _resize(self, rows: int, max_len: int, keep: list[int]) -> None:
        arena = Arena(self.model, rows, max_len, self.chunk)
        for target, row in enumerate(keep):
            arena.restore(target, self.arena.snapshot(row))
        self._adopt(arena)

    def _capacity(self, length: int) -> int:
        """Entries to keep for sequences of this length.

        With the arena's slot for padding, a multiple of 128, or of an eighth of the length where that is more.
        """
        step = max(128, 1 << max(0, length.bit_length() - 3))
        return min(-(-(length + 1) // step) * step - 1, self.context)
