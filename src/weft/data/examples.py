"""Batches of whole examples that lie in memory: pairs, labelled texts, prompts. What is larger, or should be packed, is a store."""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from weft.data.shuffle import Permutation, RowOrder
from weft.errors import UserError


class Example(Protocol):
    """What a batch is made of; its `repr` says all that it is."""

    @property
    def num_tokens(self) -> int: ...


E = TypeVar("E", bound=Example)
B = TypeVar("B")


class ExampleBatches(Generic[E, B]):
    """Batch number `step` as a pure function of the step and the seed: `batch_size` examples, each once an epoch.

    train, valid  the examples; their `repr` says what they are, for a run that is resumed must find the same.
    collate       makes a batch of some examples; of none, for the rows that only fill up a last batch, it is never asked.
    batch_size    examples of the global batch, over all ranks.
    length        tokens that one example takes at most; only for what is told about the run's pace.
    """

    def __init__(
        self,
        train: Sequence[E],
        collate: Callable[[Sequence[E]], B],
        batch_size: int,
        length: int,
        *,
        valid: Sequence[E] = (),
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        name: str = "examples",
    ) -> None:
        if not train:
            raise UserError(f"{name} has no example to train on; give some, or hold out fewer.")
        if batch_size % world:
            raise UserError(f"the batch is {batch_size} examples for {world} processes; it must be a multiple of their number.")
        self.examples, self.collate, self.batch_size, self.length = train, collate, batch_size, length
        self.valid: Sequence[E] | None = valid or None
        self.seed, self.rank, self.world, self.name = seed, rank, world, name
        self._order = RowOrder(len(train), True, seed, zlib.crc32(name.encode("utf-8")))

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.length

    def batch(self, step: int) -> B:
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        rows = self._order.rows(np.arange(first, first + share, dtype=np.int64))
        return self.collate([self.examples[row] for row in rows.tolist()])

    def validation(self, max_batches: int | None = None) -> Iterator[B]:
        """The held-out examples, or an evenly spread part of them, this rank's share of each batch. What is left over and has not one for
        every rank goes with the last batch."""
        assert self.valid is not None
        count = len(self.valid) if max_batches is None else min(len(self.valid), max_batches * self.batch_size)
        chosen = [self.valid[index * len(self.valid) // count] for index in range(count)]
        starts = [start for start in range(0, count, self.batch_size) if start == 0 or count - start >= self.world]
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            own = chosen[start:stop][self.rank :: self.world]
            yield self.collate(own or chosen[:1])

    def report(self, steps: int | None = None) -> list[dict[str, Any]]:
        seen = len(self.examples) if steps is None else steps * self.batch_size
        tokens = sum(example.num_tokens for example in self.examples)
        count = len(self.examples)
        facts = {"source": self.name, "proportion": 1.0, "epochs": seen / count, "tokens": tokens, "documents": count}
        return [{**facts, "text_bytes": 0, "disk_bytes": 0}]

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for example in (*self.examples, *(self.valid or ())):
            digest.update(repr(example).encode("utf-8", "surrogatepass"))
        return {"batch_size": self.batch_size, "seed": self.seed, "examples": len(self.examples), "data": digest.hexdigest()}


def split_examples(examples: Sequence[E], share: float | None, seed: int = 0) -> tuple[list[E], list[E]]:
    """Training and held-out examples: `share` of them (None: a tenth, at most 512) drawn by the seed; 0 holds out none."""
    drawn = draw_held_out(len(examples), share, seed)
    return [e for i, e in enumerate(examples) if i not in drawn], [e for i, e in enumerate(examples) if i in drawn]


def draw_held_out(count: int, share: float | None, seed: int = 0) -> set[int]:
    """Which of `count` examples are held out; see `split_examples`."""
    held = min(512, count // 10) if share is None else round(share * count)
    if not 0 <= held < count:
        raise UserError(f"{share or 0:g} of {count} examples would leave none to train on; hold out fewer with data.valid.")
    return set(Permutation(count, seed, 2)(np.arange(held, dtype=np.int64)).tolist()) if held else set()
