"""The prefix cache: state of text that was read before, found again by what the text says."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from torch import Tensor

from weft.nn import Arena, Model
from weft.nn.arena import Copy

Chain = list[bytes]
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Hit:
    """What the cache has of a text: its first `length` tokens, in these pages and, for state that is kept a row, in this snapshot."""

    length: int = 0
    pages: tuple[int, ...] = ()
    copy: Copy | None = None


class PrefixCache:
    """Blocks of `page` tokens under a hash of their tokens and all before them.

    The chain of hashes is h_i = BLAKE2b(h_{i-1}, tokens of block i), and h_{-1} that of `mode`, which says in what numbers state is kept.
    Of a model with several adapters the chain of a text begins with its adapter's number too. A cache is one arena's, so one model's;
    whoever changes its weights clears it. A full page is put here as soon as it is full, and stays the arena's: it is shared by reference,
    and taken back, the least recently used first, when pages run out. FIXED and RING leaves cannot be shared by pages; of them there are
    snapshots at ends of blocks, at most `snapshot_bytes` of them, and a prefix ends where there is one.

    Nothing is cached for a model that attends to a memory: equal tokens do not mean equal state there.
    """

    def __init__(self, arena: Arena, page: int, mode: str, snapshot_bytes: int, enabled: bool = True) -> None:
        kinds = {leaf.kind for leaf in arena.leaves.values()}
        self.arena, self.page = arena, page
        self.enabled = enabled and "static" not in kinds
        self.snapshots_needed = bool(kinds & {"fixed", "ring"})
        self._paged = "append" in kinds
        self._root = blake2b(mode.encode(), digest_size=DIGEST_BYTES).digest()
        self._pages: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        self._snapshots: OrderedDict[bytes, Copy] = OrderedDict()
        self._snapshot_limit, self.snapshot_bytes = snapshot_bytes, 0
        arena.pages.on_evict = self._evicted

    def extend(self, chain: Chain, ids: Sequence[int], adapter: int = 0) -> None:
        """Add to the hashes of a text's first blocks those of all its further full blocks."""
        for end in range((len(chain) + 1) * self.page, len(ids) + 1, self.page):
            parent = chain[-1] if chain else self._root + (adapter.to_bytes(4, "little") if adapter else b"")
            block = array("q", ids[end - self.page : end]).tobytes()
            chain.append(blake2b(parent + block, digest_size=DIGEST_BYTES).digest())

    def find(self, ids: Sequence[int], chain: Chain, adapter: int = 0) -> Hit:
        """The longest cached beginning of a text that leaves at least its last token to be computed. Extends the text's chain."""
        if not self.enabled:
            return Hit()
        self.extend(chain, ids, adapter)
        pages: list[int] = []
        length, copy = 0, None
        for number in range((len(ids) - 1) // self.page):
            if self._paged:
                page = self._pages.get(chain[number])
                if page is None:
                    break
                pages.append(page)
            if not self.snapshots_needed:
                length = (number + 1) * self.page
            elif chain[number] in self._snapshots:
                length, copy = (number + 1) * self.page, self._snapshots[chain[number]]
                self._snapshots.move_to_end(chain[number])
        return Hit(length, tuple(pages[: length // self.page]), copy)

    def keep(self, row: int, chain: Chain, known: int, length: int) -> int:
        """Take note of the full pages of a row whose first `length` tokens are in its state and in `chain`; `known` blocks were noted
        before. Returns how many are now."""
        blocks = length // self.page
        if self._paged and self.enabled:
            owned, table = self.arena.pages.owned[row], self.arena.pages
            for number in range(known, blocks):
                if chain[number] not in self._pages:
                    self._pages[chain[number]] = owned[number]
                    self._hashes[owned[number]] = chain[number]
                    table.kept.add(owned[number])
        return blocks

    def take_snapshot(self, row: int, name: bytes, replaces: bytes | None = None) -> None:
        """Copy a row's FIXED and RING state, which stands at the end of the block `name`; an older one may be dropped for it."""
        if replaces is not None:
            self._drop_snapshot(replaces)
        if name in self._snapshots:
            return
        copy = self.arena.snapshot(row, paged=False)
        size = _num_bytes(copy)
        while self._snapshots and self.snapshot_bytes + size > self._snapshot_limit:
            self._drop_snapshot(next(iter(self._snapshots)))
        if size <= self._snapshot_limit:
            self._snapshots[name] = copy
            self.snapshot_bytes += size

    def forget(self, pages: Sequence[int]) -> None:
        """Drop these pages' content, which is not to be used again."""
        for page in pages:
            if page in self._hashes:
                self._evicted(page)
                self.arena.pages.forget(page)

    def clear(self) -> None:
        """Drop everything."""
        self.forget(list(self._hashes))
        self._snapshots.clear()
        self.snapshot_bytes = 0

    def _evicted(self, page: int) -> None:
        name = self._hashes.pop(page)
        del self._pages[name]
        self._drop_snapshot(name)

    def _drop_snapshot(self, name: bytes) -> None:
        copy = self._snapshots.pop(name, None)
        if copy is not None:
            self.snapshot_bytes -= _num_bytes(copy)


def _num_bytes(copy: Copy) -> int:
    return sum(value.numel() * value.element_size() for value in copy.values() if isinstance(value, Tensor))


def numeric_mode(model: Model, arena: Arena) -> str:
    """What decides the bits of a model's state besides its tokens: its layers' kinds and dtypes, and that of the state."""
    modules = {
        f"{type(module).__qualname__}:{tensor.dtype}"
        for module in model.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return ";".join([*sorted(modules), str(arena.dtype), f"fast:{model.fast}"])
