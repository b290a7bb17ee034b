"""The arena: every byte of decode state, for every row and layer. The model owns none."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import UserError
from weft.nn.model import Model, Pending
from weft.nn.pages import PageTable
from weft.nn.step import Keep, Step
from weft.nn.views import Dense, Paged, Ring
from weft.spec import Leaf

Key = tuple[int, str, str]
DTYPES = {"float32": torch.float32, "int64": torch.int64}


class Arena(nn.Module):
    """State of `rows` sequences of up to `max_len` tokens, fed at most `max_chunk` tokens a pass.

    Growing leaves are written in place beyond `lens` and become visible when `commit` moves `lens`; FIXED leaves change in
    `commit` alone. Buffers, so that compiled code may update them; not persistent, so that no checkpoint holds them.

    page  None lays APPEND leaves out densely; a number lays them out in pages of that many tokens, `num_pages` in the pool
          (default: enough for every row), and then `reserve` must be called before tokens are fed.
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
    ) -> None:
        super().__init__()
        weight = model.embed.weight
        self.rows, self.max_len, self.max_chunk = rows, max_len, max_chunk
        self.dtype = dtype or weight.dtype
        self._model = (model,)  # in a tuple, so that the model is not registered as a part of its own arena
        self.leaves: dict[Key, Leaf] = dict(_leaves(model))
        self.page = page
        device = weight.device
        self.register_buffer("lens", torch.zeros(rows, dtype=torch.long, device=device), persistent=False)
        if page is not None:
            columns = -(-max_len // page)
            self.num_pages = 1 + (num_pages or rows * columns)
            self.pages = PageTable(self.num_pages, page, rows)
            self.register_buffer("table", torch.zeros(rows, columns, dtype=torch.long, device=device), persistent=False)
        for key, leaf in self.leaves.items():
            buffer = torch.full(self._shape(leaf), leaf.fill, dtype=self._dtype(leaf), device=device)
            self.register_buffer(_name(key), buffer, persistent=False)

    def _shape(self, leaf: Leaf) -> tuple[int, ...]:
        if leaf.kind in ("fixed", "static"):
            return (self.rows, *leaf.shape)
        if leaf.kind == "append" and self.page is not None:
            return (self.num_pages, self.page, *leaf.shape)
        capacity = self.max_len
        if leaf.kind == "ring":
            assert leaf.window is not None
            capacity = min(leaf.window - 1 + self.max_chunk, self.max_len)
        return (self.rows, *leaf.shape[:-1], capacity + 1, *leaf.shape[-1:])  # one slot more collects padding

    def _dtype(self, leaf: Leaf) -> torch.dtype:
        if leaf.dtype is None or (self.dtype == torch.float64 and leaf.dtype == "float32"):
            return self.dtype
        return DTYPES[leaf.dtype]

    def _buffer(self, key: Key) -> Tensor:
        return self.get_buffer(_name(key))

    def views(self, rows: Tensor | None = None) -> list[dict[str, Any]]:
        """Per layer and part, what each mixer sees of its leaves. FIXED and STATIC ones are tensors [B, *shape]."""
        layers: list[dict[str, Any]] = [{} for _ in self._model[0].blocks]
        for layer, names in zip(layers, self._model[0].layers(), strict=True):
            layer.update({part: {} for part in names.names})
        for key, leaf in self.leaves.items():
            layers[key[0]][key[1]][key[2]] = self._view(leaf, self._buffer(key), rows)
        return layers

    def _view(self, leaf: Leaf, buffer: Tensor, rows: Tensor | None) -> Any:
        if leaf.kind in ("fixed", "static"):
            return buffer if rows is None else buffer[rows]
        if leaf.kind == "ring":
            return Ring(buffer, max(1, len(leaf.shape)))
        return Dense(buffer, max(1, len(leaf.shape))) if self.page is None else Paged(buffer)

    def step(self, n_new: Tensor, length: int, rows: Tensor | None = None, keep: Keep = "all") -> Step:
        """Metadata for feeding tokens [B, length], n_new [B] of them valid, to these rows (None: all rows in order)."""
        assert length <= self.max_chunk, f"a pass of {length} tokens in an arena for {self.max_chunk}"
        table = None if self.page is None else self.table if rows is None else self.table[rows]
        return Step(self.lens if rows is None else self.lens[rows], n_new, length, rows=rows, table=table, keep=keep)

    def commit(self, pending: Pending, accepted: Tensor, rows: Tensor | None = None) -> None:
        """Make the first `accepted` [B] tokens of the last pass part of the state: the only way state advances.

        0 leaves a row as it was. After a pass with keep="last" accepted is 0 or n_new.
        """
        views = self.views(rows)
        index = torch.arange(accepted.shape[0], device=accepted.device)
        last = (accepted - 1).clamp(min=0)
        for i, block in enumerate(self._model[0].layers()):
            for name, part in block.parts().items():
                produced = pending[i][name]
                if not produced:
                    continue
                if hasattr(part, "commit"):
                    new = part.commit(views[i][name], produced, accepted)
                else:
                    new = {leaf: values[index, last.clamp(max=values.shape[1] - 1)] for leaf, values in produced.items()}
                for leaf, value in new.items():
                    self._replace((i, name, leaf), views[i][name][leaf], value, accepted > 0, rows)
        if rows is None:
            self.lens.add_(accepted)
        else:
            self.lens.index_add_(0, rows, accepted)

    def _replace(self, key: Key, old: Tensor, new: Tensor, advanced: Tensor, rows: Tensor | None) -> None:
        mask = advanced.view(-1, *[1] * (new.ndim - 1))
        value = torch.where(mask, new.to(old.dtype), old)
        if rows is None:
            self._buffer(key).copy_(value)
        else:
            self._buffer(key).index_copy_(0, rows, value)

    @torch.no_grad()
    def prime(self, memory: Tensor, lengths: Tensor, rows: Tensor | None = None) -> None:
        """Write STATIC leaves from a memory [B, S, M] with `lengths` [B] valid entries."""
        for i, block in enumerate(self._model[0].layers()):
            for name, part in block.parts().items():
                if hasattr(part, "prime"):
                    for leaf, value in part.prime(memory, lengths).items():
                        buffer = self._buffer((i, name, leaf))
                        buffer.copy_(value) if rows is None else buffer.index_copy_(0, rows, value.to(buffer.dtype))

    def reserve(self, lengths: dict[int, int]) -> None:
        """Make room for each row to reach a length; needed before feeding a paged arena, nothing to do in a dense one.

        Raises UserError when a length exceeds max_len or the pool has no page left.
        """
        for length in lengths.values():
            if length > self.max_len:
                raise UserError(f"{length} tokens are asked of a state that holds {self.max_len}; shorten the text or raise the limit.")
        if self.page is None:
            return
        committed = self.lens.tolist()
        for row, length in lengths.items():
            for source, target in self.pages.reserve(row, committed[row], length):
                for key, leaf in self.leaves.items():
                    if leaf.kind == "append":
                        self._buffer(key)[target] = self._buffer(key)[source]
            self._write_table(row)

    def reset(self, rows: list[int]) -> None:
        """Start rows anew. Their old content need not be cleared: position 0 means fresh state."""
        for row in rows:
            self.lens[row] = 0
            if self.page is not None:
                self.pages.release(row)
                self._write_table(row)

    def _write_table(self, row: int) -> None:
        owned = self.pages.owned[row]
        self.table[row] = 0
        self.table[row, : len(owned)] = torch.tensor(owned, dtype=torch.long, device=self.table.device)

    @torch.no_grad()
    def fork(self, source: int, target: int) -> None:
        """Make row `target` a copy of row `source`. In a paged arena pages are shared until one of the two writes."""
        if self.page is not None:
            self.pages.fork(source, target, int(self.lens[source]))
            self._write_table(target)
        for key, leaf in self.leaves.items():
            if leaf.kind != "append" or self.page is None:
                self._buffer(key)[target] = self._buffer(key)[source]
        self.lens[target] = self.lens[source]

    @torch.no_grad()
    def snapshot(self, row: int) -> dict[Key | str, Tensor]:
        """A copy of one row's state that `restore` can put back into any row of an arena of the same model and sizes."""
        length = int(self.lens[row])
        copy: dict[Key | str, Tensor] = {"lens": self.lens[row].clone()}
        for key, leaf in self.leaves.items():
            if leaf.kind in ("append", "ring"):
                copy[key] = self._entries(key, leaf, row, length).clone()
            else:
                copy[key] = self._buffer(key)[row].clone()
        return copy

    @torch.no_grad()
    def restore(self, row: int, copy: dict[Key | str, Tensor]) -> None:
        """Put a snapshot into a row, replacing what it held."""
        self.reset([row])
        length = int(copy["lens"])
        self.reserve({row: length})
        for key, leaf in self.leaves.items():
            if leaf.kind == "append" and self.page is not None:
                where = torch.arange(length, device=self.lens.device)
                self._buffer(key)[self.table[row, where // self.page], where % self.page] = copy[key]
            elif leaf.kind in ("append", "ring"):
                self._entries(key, leaf, row, length).copy_(copy[key])
            else:
                self._buffer(key)[row] = copy[key]
        self.lens[row] = length

    def _entries(self, key: Key, leaf: Leaf, row: int, length: int) -> Tensor:
        """A row's entries [length, *shape] of an APPEND leaf, or the slots in use of a RING leaf (a view where the layout is dense)."""
        if self.page is None or leaf.kind == "ring":
            entries = self._buffer(key).movedim(max(1, len(leaf.shape)), 1)[row]
            return entries[: min(length, entries.shape[0] - 1)]
        return self._buffer(key)[self.table[row]].flatten(0, 1)[:length]

    @torch.no_grad()
    def resized(self, rows: int, max_len: int, keep: list[int]) -> "Arena":
        """A dense arena of another size whose first rows are copies of the rows `keep`, none of which may be longer than max_len."""
        assert self.page is None
        other = Arena(self._model[0], rows, max_len, self.max_chunk, self.dtype)
        source = torch.tensor(keep, dtype=torch.long, device=self.lens.device)
        for key, leaf in self.leaves.items():
            old, new = self._buffer(key)[source], other._buffer(key)[: len(keep)]
            if leaf.kind in ("append", "ring"):
                # Slots keep their numbers: a ring smaller than its final size has never wrapped.
                axis = max(1, len(leaf.shape))
                slots = min(old.shape[axis], new.shape[axis]) - 1
                old, new = old.narrow(axis, 0, slots), new.narrow(axis, 0, slots)
            new.copy_(old)
        other.lens[: len(keep)] = self.lens[source]
        return other

    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


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
