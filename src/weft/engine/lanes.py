"""Rows of decode state, and what runs in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.engine.budget import default_memory, plan_memory
from weft.engine.prefix import Chain, Hit, PrefixCache, numeric_mode
from weft.nn import Arena, Model, Runner
from weft.nn.arena import Copy
from weft.nn.model import Pending
from weft.nn.pages import PAGE

FIRST_TOKENS = 1024
FREE_GROWTH = 8


@dataclass(eq=False)
class Lane:
    """One row at work: `ids` are the prompt and all that was generated, the first `fed` of them are in the row's state.

    start  tokens that the lane began with: the prompt, and after a preemption what had been generated.
    chain  hashes of the text's full blocks, as far as they were needed; `known` of them were handed to the cache.
    """

    owner: Any
    row: int
    ids: list[int]
    fed: int = 0
    start: int = 0
    chain: Chain = field(default_factory=list)
    known: int = 0
    snapshot: bytes | None = None
    live: bool = True
    adapter: int = 0  # which of several the model has

    @property
    def pending(self) -> int:
        return len(self.ids) - self.fed


Listener = Callable[[Sequence[Lane], Sequence[int], Tensor], None]


class Lanes:
    """A paged arena within a byte budget, its rows lent to lanes. `active[i]` is the lane in row i: rows at work are the first ones.

    limit    most rows at a time.
    chunk    most tokens a row is fed in one pass.
    context  longest sequence.
    memory   bytes for all decode state; None takes a share of what the machine has left.
    page     tokens a page.
    cache    whether state of text that was read is looked for in, and kept for, other requests.
    """

    def __init__(
        self, model: Model, limit: int, chunk: int, context: int, memory: int | None = None, page: int = PAGE, cache: bool = True
    ) -> None:
        self.model, self.context, self.page = model, context, page
        self.chunk = min(chunk, context)
        self.device = model.device
        self.memory = default_memory(self.device) if memory is None else memory
        self.arena = Arena(model, 1, self._capacity(1), self.chunk, page=page, num_pages=1)
        plan = plan_memory(self.arena, limit, self.context, self.memory)
        self.limit = plan.rows
        self.has_pages = self.arena.page_bytes > 0
        self.max_pages = plan.pages if self.has_pages else limit * -(-context // page)
        self.arena.allow_pages(self.max_pages, max(-(-FIRST_TOKENS // page), self.max_pages // FREE_GROWTH))
        self.cache = PrefixCache(self.arena, page, numeric_mode(model, self.arena), plan.snapshot_bytes, cache)
        self.cached_tokens = 0
        self.active: list[Lane] = []
        self._runner = Runner(model, self.arena)
        self._has_rings = any(leaf.kind == "ring" for leaf in self.arena.leaves.values())
        self._listener: Listener | None = None
        self._hidden: Tensor | None = None
        shared = getattr(model, "adapters", None)
        self.has_adapters = shared is not None and bool(shared.names)
        self._ones: dict[int, Tensor] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def listen(self, listener: Listener) -> None:
        """Let `listener(lanes, counts, hidden)` know of every pass: the first counts[i] of the hidden states hidden[i] [T, D] belong to
        tokens that are now part of lanes[i], the last ones that it was fed."""

        def keep(hidden: Tensor) -> None:
            self._hidden = hidden

        self._listener, self._runner.listener = listener, keep

    def _tell(self, lanes: Sequence[Lane], counts: Sequence[int], rows: Tensor | None = None) -> None:
        if self._listener is not None and self._hidden is not None:
            self._listener(lanes, counts, self._hidden if rows is None else self._hidden[rows])
            self._hidden = None

    # Rows.

    @property
    def available(self) -> int:
        return self.limit - len(self.active)

    def adapter_of(self, owner: Any) -> int:
        """The number of a text's adapter, where the model has several."""
        return owner.task.adapter if self.has_adapters else 0

    def find(self, ids: Sequence[int], chain: Chain, adapter: int = 0) -> Hit:
        """What the cache has of a prompt."""
        return self.cache.find(ids, chain, adapter)

    def has_room(self, length: int, hit: Hit) -> bool:
        """Whether a prompt of `length` tokens can be read, and every row at work go on to another page, without anybody being preempted."""
        table = self.arena.pages
        shared = sum(table.references[page] > 0 for page in hit.pages)
        growth = self.arena.max_pages - self.arena.num_pages
        return -(-(length + 1) // self.page) - shared + len(self.active) <= table.num_available + growth

    def take(self, owner: Any, ids: Sequence[int], hit: Hit = Hit(), chain: Chain | None = None) -> Lane:
        """Lend a row to a prompt of which the cache has `hit`."""
        row = len(self.active)
        assert row < self.limit
        self._make_rows(row + 1, hit.length)
        self.arena.attach(row, hit.pages, hit.length, hit.copy)
        self.cached_tokens += hit.length
        chain, adapter = [] if chain is None else chain, self.adapter_of(owner)
        lane = Lane(owner, row, list(ids), hit.length, len(ids), chain, hit.length // self.page, adapter=adapter)
        self.active.append(lane)
        return lane

    def _make_rows(self, rows: int, length: int) -> None:
        arena = self.arena
        if rows > arena.rows:
            arena.resize(min(self.limit, max(rows, 2 * arena.rows)), max(arena.max_len, self._capacity(length)))
        elif length > arena.max_len or (rows == 1 and self._has_rings and arena.max_len > 2 * self._capacity(length)):
            arena.resize(arena.rows, self._capacity(length))  # alone, a row need not read as long a ring as those before it

    def give_back(self, lane: Lane) -> None:
        """End a lane and free its pages; the last lane moves to its row."""
        last = self.active.pop()
        if last is lane:
            self.arena.reset([lane.row])
        else:
            self.arena.move(last.row, lane.row)
            self.active[lane.row], last.row = last, lane.row
        lane.live = False

    def scrub(self, lane: Lane) -> None:
        """Clear a lane's state of numbers that are not finite."""
        self.cache.forget(self.arena.pages.owned[lane.row])
        self.arena.scrub(lane.row)

    def fork(self, lane: Lane, target: Lane) -> None:
        """Make a lane's state and tokens a copy of another's."""
        if lane is not target:
            self.arena.fork(lane.row, target.row)
            target.ids, target.fed = list(lane.ids), lane.fed
            target.chain, target.known = list(lane.chain), lane.known

    def prime(self, lane: Lane, memory: Tensor) -> None:
        """Write the state of cross-attention from a memory [S, M]."""
        rows = torch.tensor([lane.row], device=self.device)
        self.arena.prime(memory[None].to(self.device, self.model.dtype), torch.tensor([memory.shape[0]], device=self.device), rows)

    # Feeding.

    def reserve(self, lane: Lane, count: int) -> None:
        """Make room for the lane's next `count` tokens. Raises PagesExhausted where there is none."""
        length = lane.fed + count
        if length > self.arena.max_len:
            self.arena.resize(self.arena.rows, self._capacity(length))
        self.arena.reserve({lane.row: length}, {lane.row: lane.fed})

    def next_count(self, lane: Lane) -> int:
        """Tokens of a prompt to feed in one pass: up to a multiple of the chunk size, so that the bounds depend on the request alone.
        Where the cache needs snapshots, also to the end of the last full page that leaves a token to be computed."""
        count = min(lane.pending, self.chunk - lane.fed % self.chunk)
        if self.cache.enabled and self.cache.snapshots_needed:
            bound = (len(lane.ids) - 1) // self.page * self.page
            if lane.fed < bound:
                count = min(count, bound - lane.fed)
        return count

    def feed_chunks(self, lanes: Sequence[Lane]) -> Tensor:
        """Feed each lane its next chunk, for which room was reserved; logits [B, V] after its last token."""
        counts = [self.next_count(lane) for lane in lanes]
        tokens = torch.zeros(len(lanes), max(counts), dtype=torch.long)
        for i, (lane, count) in enumerate(zip(lanes, counts, strict=True)):
            tokens[i, :count] = torch.tensor(lane.ids[lane.fed : lane.fed + count])
        n_new = torch.tensor(counts, device=self.device)
        columns = self.columns_of(lanes, max(counts))
        logits: Tensor = self._runner(tokens.to(self.device), n_new, self.rows_of(lanes), columns, self.adapters_of(lanes))
        for lane, count in zip(lanes, counts, strict=True):
            lane.fed += count
        self._tell(lanes, counts)
        return logits

    def feed_single(self, lanes: Sequence[Lane]) -> Tensor:
        """Feed one token to each lane, for which room was reserved; logits [B, V]."""
        chosen, fed = None, lanes
        if self._has_rings and lanes[-1].row >= len(lanes):
            # Rings of rows named one by one are copied; that all rows run, some of them idle, costs less.
            fed, chosen = self.active, self._index(tuple(lane.row for lane in lanes))
        tokens = torch.tensor([[lane.ids[lane.fed] if lane.pending else 0] for lane in fed], device=self.device)
        counts = self._counts(len(lanes)) if chosen is None else torch.zeros_like(tokens[:, 0]).index_fill_(0, chosen, 1)
        logits: Tensor = self._runner(tokens, counts, self.rows_of(fed), self.columns_of(lanes, 1), self.adapters_of(fed))
        for lane in lanes:
            lane.fed += 1
        self._tell(lanes, [1] * len(lanes), chosen)
        return logits if chosen is None else logits[chosen]

    def feed_drafts(self, lanes: Sequence[Lane], drafts: Sequence[Sequence[int]]) -> tuple[Tensor, Pending]:
        """Feed each lane its next token and its draft, for which room was reserved: logits [N, V] after each of all these tokens, lane
        by lane, and what `commit_drafts` takes."""
        fed = [[lane.ids[lane.fed], *draft] for lane, draft in zip(lanes, drafts, strict=True)]
        longest = max(map(len, fed))
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in fed], device=self.device)
        n_new = torch.tensor([len(ids) for ids in fed], device=self.device)
        index = torch.tensor([row * longest + place for row, ids in enumerate(fed) for place in range(len(ids))], device=self.device)
        columns = self.columns_of(lanes, longest)
        return self._runner.verify(tokens, n_new, index, self.rows_of(lanes), columns, self.adapters_of(lanes))

    def commit_drafts(self, lanes: Sequence[Lane], pending: Pending, drafts: Sequence[Sequence[int]]) -> None:
        """After `feed_drafts`, and before anything else is done with the lanes: these beginnings of their drafts stand."""
        counts = [1 + len(draft) for draft in drafts]
        self.arena.commit(pending, torch.tensor(counts, device=self.device), self.rows_of(lanes))
        for lane, draft, count in zip(lanes, drafts, counts, strict=True):
            lane.ids += draft
            lane.fed += count
        self._tell(lanes, counts)

    def draft_room(self, lane: Lane) -> int:
        """How many tokens can be drafted for a lane: as many as fit in a pass and in the context, and for a model that needs snapshots not
        beyond the end of a page."""
        room = min(self.chunk, self.context - lane.fed) - 1
        if self.cache.enabled and self.cache.snapshots_needed:
            room = min(room, self.page - lane.fed % self.page - 1)
        return room

    def rewind(self, lane: Lane, length: int, copy: Copy | None) -> None:
        """Take back what a lane was fed beyond its first `length` tokens."""
        self.arena.rewind(lane.row, length, copy)
        lane.ids, lane.fed = lane.ids[:length], length

    def keep(self, lanes: Sequence[Lane]) -> None:
        """Hand what these lanes have read to the cache."""
        if not self.cache.enabled:
            return
        for lane in lanes:
            blocks = lane.fed // self.page
            if blocks > lane.known and lane.live:
                self.cache.extend(lane.chain, lane.ids[: lane.fed], lane.adapter)
                lane.known = self.cache.keep(lane.row, lane.chain, lane.known, lane.fed)
                if self.cache.snapshots_needed and lane.fed % self.page == 0:
                    self._snapshot(lane)

    def _snapshot(self, lane: Lane) -> None:
        """A text under way needs one snapshot, its latest; those at the bounds of the prompt's chunks stay for other texts."""
        name = lane.chain[lane.known - 1]
        self.cache.take_snapshot(lane.row, name, lane.snapshot)
        lane.snapshot = name if lane.fed > lane.start else None

    def rows_of(self, lanes: Sequence[Lane]) -> Tensor | int:
        """How a pass names these lanes' rows: a number where they are the first ones in order, so that nothing is gathered."""
        rows = tuple(lane.row for lane in lanes)
        return len(rows) if rows == tuple(range(len(rows))) else self._index(rows)

    def adapters_of(self, lanes: Sequence[Lane]) -> Tensor | None:
        """Which adapter each of these lanes' rows has, as `Step.adapters`; None where none has one, so that nothing is multiplied."""
        return self._index(tuple(lane.adapter for lane in lanes)) if any(lane.adapter for lane in lanes) else None

    def _index(self, rows: tuple[int, ...]) -> Tensor:
        if rows not in self._indices:
            if len(self._indices) >= 64:
                self._indices.clear()
            self._indices[rows] = torch.tensor(rows, device=self.device)
        return self._indices[rows]

    def _counts(self, batch: int) -> Tensor:
        if batch not in self._ones:
            self._ones[batch] = torch.ones(batch, dtype=torch.long, device=self.device)
        return self._ones[batch]

    def columns_of(self, lanes: Sequence[Lane], count: int) -> int:
        """Columns of the page table for a pass of up to `count` tokens."""
        longest = max(lane.fed for lane in lanes) + count
        return min(-(-self._bucket(longest) // self.page), self.arena.table.shape[1])

    def _bucket(self, length: int) -> int:
        """Keys that a pass over sequences of this length reads: a multiple of 128, or of an eighth of the length where that is more."""
        step = max(128, 1 << max(0, length.bit_length() - 3))
        return -(-length // step) * step

    def _capacity(self, length: int) -> int:
        """Tokens to be ready for, where sequences have this length."""
        return min(self._bucket(length + 1) - 1, self.context)  # with the slot that collects padding, a ring is a bucket long

    @property
    def bytes_used(self) -> int:
        """Of running rows, and of snapshots."""
        return (
            self.arena.pages.num_used * self.arena.page_bytes
            + len(self.active) * self.arena.row_bytes(self.context)
            + self.cache.snapshot_bytes
        )

    @property
    def bytes_allocated(self) -> int:
        return self.arena.bytes() + self.cache.snapshot_bytes
