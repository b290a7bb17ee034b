"""The arena: every byte of decode state, for every row and layer. The model owns none."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import UserError
from weft.nn.model import Model, Pending
from weft.nn.pages import BLANK, RESERVED, PageTable
from weft.nn.state_codes import SCALE_BYTES
from weft.nn.step import Keep, Step
from weft.nn.views import Dense, Paged, Ring, View
from weft.spec import Leaf

Key = tuple[int, str, str]
Rows = Tensor | int | None
Copy = dict[Key | str, Tensor]
DTYPES = {"float32": torch.float32, "int64": torch.int64}


class Arena(nn.Module):
    """State of `rows` sequences of up to `max_len` tokens, fed at most `max_chunk` tokens a pass.

    Growing leaves are written in place beyond `lens` and become visible when `commit` moves `lens`; FIXED leaves change in
    `commit` alone. Buffers, so that compiled code may update them; not persistent, so that no checkpoint holds them.

    dtype      of state; None takes the model's `state_dtype`. int8 keeps growing leaves in 8 bits and the others in the model's dtype.
    page       None lays APPEND leaves out densely; a number lays them out in one pool of pages of that many tokens, and then `reserve`
               must be called before tokens are fed. RING, FIXED and STATIC leaves are kept a row in either case.
    num_pages  in the pool; default: enough for every row.
    max_pages  the pool doubles, up to this many, when `reserve` finds no free page; default: num_pages.

    Wherever rows are named, a tensor [B] int64 names them one by one, an int n means the first n, and None means all.
    Raises UserError for a model that cannot run incrementally.
    """

    lens: Tensor
    table: Tensor

    def __init__(
        self,
        model: Model,
        rows: int,
        max_len: int,
        max_chunk: int,
        dtype: torch.dtype | None = None,
        page: int | None = None,
        num_pages: int | None = None,
        max_pages: int | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.max_len, self.max_chunk = rows, max_len, max_chunk
        self.dtype = dtype or model.state_dtype
        self._model = (model,)  # in a tuple, so that the model is not registered as a part of its own arena
        self.leaves: dict[Key, Leaf] = {key: self._coded(leaf) for key, leaf in _leaves(model)}
        self.page = page
        self.register_buffer("lens", torch.zeros(rows, dtype=torch.long, device=model.device), persistent=False)
        if page is not None:
            columns = -(-max_len // page)
            self.num_pages = RESERVED + (rows * columns if num_pages is None else num_pages)
            self.allow_pages(max_pages or 0)
            self.pages = PageTable(self.num_pages, page, rows)
            self.register_buffer("table", torch.zeros(rows, columns, dtype=torch.long, device=model.device), persistent=False)
        for key, leaf in self.leaves.items():
            self.register_buffer(_name(key), self._blank(leaf), persistent=False)
        self._recurrent = [
            (i, name, part)
            for i, block in enumerate(model.layers())
            for name, part in block.parts().items()
            if any(leaf.kind == "fixed" for key, leaf in self.leaves.items() if key[:2] == (i, name))
        ]
        self._build_views()

    def _blank(self, leaf: Leaf) -> Tensor:
        return torch.full(self._shape(leaf), leaf.fill, dtype=self._dtype(leaf), device=self.lens.device)

    def _shape(self, leaf: Leaf) -> tuple[int, ...]:
        if leaf.kind in ("fixed", "static"):
            return (self.rows, *leaf.shape)
        if self._is_paged(leaf):
            assert self.page is not None
            return (self.num_pages, self.page, *leaf.shape)
        capacity = self.max_len
        if leaf.kind == "ring":
            capacity = leaf.slots(self.max_len, self.max_chunk)
        return (self.rows, *leaf.shape[:-1], capacity + 1, *leaf.shape[-1:])  # one slot more collects padding

    def _is_paged(self, leaf: Leaf) -> bool:
        return leaf.kind == "append" and self.page is not None

    def _is_coded(self, leaf: Leaf) -> bool:
        return self.dtype == torch.int8 and leaf.kind in ("append", "ring")

    def _coded(self, leaf: Leaf) -> Leaf:
        """A growing leaf as it lies in memory: in an arena of 8 bits every vector has its scale behind it."""
        return replace(leaf, shape=(*leaf.shape[:-1], leaf.shape[-1] + SCALE_BYTES)) if self._is_coded(leaf) else leaf

    def _dtype(self, leaf: Leaf) -> torch.dtype:
        if self._is_coded(leaf):
            return torch.int8
        dtype = self._model[0].dtype if self.dtype == torch.int8 else self.dtype
        if leaf.dtype is None or (dtype == torch.float64 and leaf.dtype == "float32"):
            return dtype
        return DTYPES[leaf.dtype]

    def _buffer(self, key: Key) -> Tensor:
        return self.get_buffer(_name(key))

    # What mixers see.

    def _build_views(self) -> None:
        """Views of growing leaves serve every pass; FIXED and STATIC leaves are added for the rows of each."""
        self._views: list[dict[str, Any]] = [{part: {} for part in names.names} for names in self._model[0].layers()]
        self._by_row: list[tuple[Key, Tensor]] = []
        for key, leaf in self.leaves.items():
            buffer = self._buffer(key)
            if leaf.kind in ("fixed", "static"):
                self._by_row.append((key, buffer))
                continue
            axis, decoded = max(1, len(leaf.shape)), self._model[0].dtype if self._is_coded(leaf) else None
            if self._is_paged(leaf):
                view: View = Paged(buffer, decoded)
            else:
                view = Ring(buffer, axis, decoded, leaf.pinned) if leaf.kind == "ring" else Dense(buffer, axis, decoded)
            self._views[key[0]][key[1]][key[2]] = view

    def views(self, rows: Rows = None) -> list[dict[str, Any]]:
        """Per layer and part, what each mixer sees of its leaves. FIXED and STATIC ones are tensors [B, *shape]."""
        if not self._by_row:
            return self._views
        layers = [{part: dict(leaves) for part, leaves in layer.items()} for layer in self._views]
        for (i, part, leaf), buffer in self._by_row:
            layers[i][part][leaf] = _pick(buffer, rows)
        return layers

    def step(self, n_new: Tensor, length: int, rows: Rows = None, keep: Keep = "all", columns: int | None = None) -> Step:
        """Metadata for feeding tokens [B, length], n_new [B] of them valid, to these rows.

        columns  of the page table that this pass can reach, at least ceil((start + n_new) / page) for every row; None is all of them.
                 Attention reads no more than these, so that a token's cost follows its text and not the longest one allowed.
        """
        assert length <= self.max_chunk, f"a pass of {length} tokens in an arena for {self.max_chunk}"
        table = None
        if self.page is not None:
            table = _pick(self.table, rows)
            table = table if columns is None else table[:, :columns]
        named = rows if isinstance(rows, Tensor) else None
        return Step(_pick(self.lens, rows), n_new, length, rows=named, table=table, keep=keep)

    # How state advances.

    def commit(self, pending: Pending, accepted: Tensor, rows: Rows = None) -> None:
        """Make the first `accepted` [B] tokens of the last pass part of the state: the only way state advances.

        0 leaves a row as it was. After a pass with keep="last" accepted is 0 or n_new.
        """
        if self._recurrent:
            self._commit_fixed(pending, accepted, rows)
        if isinstance(rows, Tensor):
            self.lens.index_add_(0, rows, accepted)
        else:
            _pick(self.lens, rows).add_(accepted)

    def _commit_fixed(self, pending: Pending, accepted: Tensor, rows: Rows) -> None:
        views = self.views(rows)
        index = torch.arange(accepted.shape[0], device=accepted.device)
        last = (accepted - 1).clamp(min=0)
        advanced = accepted > 0
        for i, name, part in self._recurrent:
            produced = pending[i][name]
            if hasattr(part, "commit"):
                new = part.commit(views[i][name], produced, accepted)
            else:
                new = {leaf: values[index, last.clamp(max=values.shape[1] - 1)] for leaf, values in produced.items()}
            for leaf, value in new.items():
                old = views[i][name][leaf]
                mask = advanced.view(-1, *[1] * (value.ndim - 1))
                _put(self._buffer((i, name, leaf)), rows, torch.where(mask, value.to(old.dtype), old))

    @torch.no_grad()
    def prime(self, memory: Tensor, lengths: Tensor, rows: Rows = None) -> None:
        """Write STATIC leaves from a memory [B, S, M] with `lengths` [B] valid entries."""
        for i, block in enumerate(self._model[0].layers()):
            for name, part in block.parts().items():
                if hasattr(part, "prime"):
                    for leaf, value in part.prime(memory, lengths).items():
                        _put(self._buffer((i, name, leaf)), rows, value)

    # Room.

    def reserve(self, lengths: Mapping[int, int], committed: Mapping[int, int] | None = None) -> None:
        """Make room for each row to reach a length; needed before feeding a paged arena, nothing to do in a dense one.

        committed  tokens of each row's state, where the caller knows them: `lens` need not be read back from the device then.
        Raises UserError when a length exceeds max_len, PagesExhausted when the pool has no page left and cannot grow; rows that come
        before the one that found none keep what they were given.
        """
        for length in lengths.values():
            if length > self.max_len:
                raise UserError(f"{length} tokens are asked of a state that holds {self.max_len}; shorten the text or raise the limit.")
        if self.page is None:
            return
        if committed is None:
            committed = dict(enumerate(self.lens.tolist()))
        for row, length in lengths.items():
            needed = self.pages.needed(row, committed[row], length)
            if needed == 0:
                continue
            while self.pages.num_free < needed and self._should_grow(needed):
                self._grow_pool()
            for source, target in self.pages.reserve(row, committed[row], length):
                for key, leaf in self.leaves.items():
                    if self._is_paged(leaf):
                        self._buffer(key)[target] = self._buffer(key)[source]
            self._write_table(row)

    def allow_pages(self, most: int, freely: int | None = None) -> None:
        """Let the pool grow to `most` pages; beyond `freely` only where pages in use are more than half of it, or it has no other:
        else pages that are merely kept are taken back first."""
        self.max_pages = max(self.num_pages, RESERVED + most)
        self._free_growth = self.max_pages if freely is None else RESERVED + freely

    def _should_grow(self, needed: int) -> bool:
        if self.num_pages >= self.max_pages:
            return False
        pages = self.pages
        return self.num_pages < self._free_growth or pages.num_available < needed or 2 * (pages.num_used + needed) > self.num_pages

    @torch.no_grad()
    def _grow_pool(self) -> None:
        """Twice the pages. A leaf at a time, so that no more than one is there twice."""
        held = self.num_pages
        self.num_pages = min(2 * held, self.max_pages)
        for key, leaf in self.leaves.items():
            if self._is_paged(leaf):
                pool = self._blank(leaf)
                pool[:held] = self._buffer(key)
                setattr(self, _name(key), pool)
                part = self._views[key[0]][key[1]]
                part[key[2]] = Paged(pool, part[key[2]].decoded)
        self.pages.extend(self.num_pages)

    @torch.no_grad()
    def resize(self, rows: int, max_len: int) -> None:
        """Have room for other numbers of rows and tokens. The first rows stay as they are, as many as there are in both; the pool of
        pages is not touched. None of them may be longer than max_len.

        A ring shorter than its window and a chunk grows with max_len: until it has its final size it has never wrapped, and slots keep
        their numbers.
        """
        kept = min(rows, self.rows)
        if self.page is not None:
            self.reset(range(kept, self.rows))
        old_lens, self.rows, self.max_len = self.lens, rows, max_len
        self.lens = self.lens.new_zeros(rows)
        self.lens[:kept] = old_lens[:kept]
        for key, leaf in self.leaves.items():
            if self._is_paged(leaf):
                continue
            old, fresh = self._buffer(key), self._blank(leaf)
            target = fresh[:kept]
            source = old[:kept]
            if leaf.kind in ("append", "ring"):
                axis = max(1, len(leaf.shape))
                slots = min(source.shape[axis], target.shape[axis]) - 1
                source, target = source.narrow(axis, 0, slots), target.narrow(axis, 0, slots)
            target.copy_(source)
            setattr(self, _name(key), fresh)
        if self.page is not None:
            self.table = self.table.new_zeros(rows, -(-max_len // self.page))
            self.pages.owned[kept:] = [[] for _ in range(rows - kept)]
            for row in range(kept):
                self._write_table(row)
        self._build_views()

    def reset(self, rows: Iterable[int]) -> None:
        """Start rows anew. Their old content need not be cleared: position 0 means fresh state."""
        for row in rows:
            self.lens[row] = 0
            if self.page is not None:
                self.pages.release(row)
                self._write_table(row)

    def _write_table(self, row: int) -> None:
        owned = self.pages.owned[row]
        filled = owned + [BLANK] * (self.table.shape[1] - len(owned))
        self.table[row] = torch.tensor(filled, dtype=torch.long, device=self.table.device)

    # Copies of state.

    @torch.no_grad()
    def fork(self, source: int, target: int) -> None:
        """Make row `target` a copy of row `source`. In a paged arena pages are shared until one of the two writes."""
        if self.page is not None:
            self.pages.fork(source, target, int(self.lens[source]))
        self._copy_row(source, target)

    @torch.no_grad()
    def move(self, source: int, target: int) -> None:
        """Put row `source`, with all room that was reserved for it, in the place of row `target`, and start `source` anew."""
        if self.page is not None:
            self.pages.move(source, target)
        self._copy_row(source, target)
        self.reset([source])

    def _copy_row(self, source: int, target: int) -> None:
        if self.page is not None:
            self._write_table(target)
        for key, leaf in self.leaves.items():
            if not self._is_paged(leaf):
                self._buffer(key)[target] = self._buffer(key)[source]
        self.lens[target] = self.lens[source]

    @torch.no_grad()
    def snapshot(self, row: int, paged: bool = True) -> Copy:
        """A copy of one row's state that `restore` can put back into any row of an arena of the same model and sizes.

        paged  False leaves out what lies in pages, for `attach`.
        """
        length = int(self.lens[row])
        copy: Copy = {"lens": self.lens[row].clone()}
        for key, leaf in self.leaves.items():
            if leaf.kind in ("fixed", "static"):
                copy[key] = self._buffer(key)[row].clone()
            elif paged or not self._is_paged(leaf):
                copy[key] = self._entries(key, leaf, row, length).clone()
        return copy

    @torch.no_grad()
    def restore(self, row: int, copy: Copy) -> None:
        """Put a snapshot into a row, replacing what it held."""
        self.reset([row])
        length = int(copy["lens"])
        self.reserve({row: length})
        for key, leaf in self.leaves.items():
            if self._is_paged(leaf):
                assert self.page is not None
                where = torch.arange(length, device=self.lens.device)
                self._buffer(key)[self.table[row, where // self.page], where % self.page] = copy[key]
        self._restore_unpaged(row, copy)

    @torch.no_grad()
    def attach(self, row: int, pages: Sequence[int], length: int, copy: Copy | None = None) -> None:
        """Begin a row with `length` tokens of state that lie in these pages of others, and for leaves that are kept a row in a snapshot
        taken with paged=False at that length."""
        if self.page is not None:
            self.pages.share(row, pages)
            self._write_table(row)
        self.lens[row] = length
        if copy is not None:
            self._restore_unpaged(row, copy)

    @torch.no_grad()
    def rewind(self, row: int, length: int, copy: Copy | None = None) -> None:
        """Go back to the first `length` tokens of a row's state: growing leaves by as much as max_chunk tokens; for FIXED ones it takes
        a snapshot with paged=False from there."""
        self.lens[row] = length
        if copy is not None:
            self._restore_unpaged(row, copy)

    def _restore_unpaged(self, row: int, copy: Copy) -> None:
        length = int(copy["lens"])
        for key, leaf in self.leaves.items():
            if leaf.kind in ("fixed", "static"):
                self._buffer(key)[row] = copy[key]
            elif not self._is_paged(leaf):
                self._entries(key, leaf, row, length).copy_(copy[key])
        self.lens[row] = length

    def _entries(self, key: Key, leaf: Leaf, row: int, length: int) -> Tensor:
        """A row's entries [length, *shape] of an APPEND leaf, or the slots in use of a RING leaf (a view where the layout is dense)."""
        if self._is_paged(leaf):
            return self._buffer(key)[self.table[row]].flatten(0, 1)[:length]
        entries = self._buffer(key).movedim(max(1, len(leaf.shape)), 1)[row]
        return entries[: min(length, entries.shape[0] - 1)]

    @torch.no_grad()
    def scrub(self, row: int) -> None:
        """Clear a row of numbers that are not finite: masked entries are multiplied by zero, and zero times infinity is not zero.

        Pages that other rows share are left alone: who made them unfit is among those rows, and the last of them clears them.
        """
        own = [] if self.page is None else [page for page in self.pages.owned[row] if self.pages.references[page] == 1]
        for key, leaf in self.leaves.items():
            if self._is_paged(leaf):
                self._buffer(key)[own] = 0
            else:
                self._buffer(key)[row] = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all leaves that have pages."""
        return sum(leaf.num_bytes(self.page or 0, self._dtype(leaf).itemsize) for leaf in self.leaves.values() if self._is_paged(leaf))

    def row_bytes(self, max_len: int) -> int:
        """Bytes that a row for sequences of max_len tokens keeps for itself, outside of pages."""
        total = 0
        for leaf in self.leaves.values():
            if leaf.kind == "ring":
                total += leaf.num_bytes(1, self._dtype(leaf).itemsize) * (leaf.slots(max_len, self.max_chunk) + 1)
            elif not self._is_paged(leaf):
                total += leaf.num_bytes(max_len, self._dtype(leaf).itemsize)
        return total

    def state_bytes(self, length: int) -> int:
        """Bytes of one row's state after `length` tokens, as they lie here."""
        return sum(leaf.num_bytes(length, self._dtype(leaf).itemsize) for leaf in self.leaves.values())

    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


def _pick(buffer: Tensor, rows: Rows) -> Tensor:
    """[B, *shape] of a buffer [rows, *shape]; a view unless rows are named one by one."""
    if rows is None:
        return buffer
    return buffer[:rows] if isinstance(rows, int) else buffer[rows]


def _put(buffer: Tensor, rows: Rows, value: Tensor) -> None:
    if isinstance(rows, Tensor):
        buffer.index_copy_(0, rows, value.to(buffer.dtype))
    else:
        _pick(buffer, rows).copy_(value)


def _name(key: Key) -> str:
    return "_".join(map(str, key))


def _leaves(model: Model) -> Iterator[tuple[Key, Leaf]]:
    for i, layer in enumerate(model.state_spec()):
        for part, leaves in layer.items():
            if leaves is None:
                raise UserError(
                    f"layer {i} attends to the whole sequence (causal: false), so this model cannot go token by token; "
                    "use it for scoring or embeddings, or give its attention causal: true."
                )
            for name, leaf in leaves.items():
                yield (i, part, name), leaf
