"""What a trainer holds: batch number `step`, as a pure function of the step and the seed."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from weft.data.assemble import Rows, assemble
from weft.data.mixture import Mixture, group
from weft.data.packing import PackedBatch
from weft.data.shuffle import RowOrder, mix
from weft.data.windows import EMPTY, Windows
from weft.errors import UserError


class Batches:
    """Batches of `batch_size` rows from a mixture, or from one source.

    train       what to draw from.
    batch_size  rows of the global batch, over all ranks; each of `world` ranks gets its own `batch_size / world` consecutive ones.
    valid       what `validation` covers, or None.
    shuffle     draw each epoch's rows in an order of its own, and move the cuts of `pack` and `stream`; False reads front to back.

    `batch(step)` depends on the step, the seed and the data alone: not on what was asked before, nor, the ranks' shares put
    together, on `world`. So the cursor of a run is its step, and resuming at any step costs nothing.
    """

    def __init__(
        self,
        train: Mixture | Windows,
        batch_size: int,
        *,
        valid: Mixture | Windows | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise UserError(f"the batch is {batch_size} rows for {world} ranks; it must be a multiple of the number of ranks.")
        assert 0 <= rank < world
        self.mixture = train if isinstance(train, Mixture) else Mixture([("data", train, None)])
        self.valid = valid if isinstance(valid, Mixture) or valid is None else Mixture([("data", valid, None)])
        self.batch_size, self.seed, self.shuffle, self.rank, self.world = batch_size, seed, shuffle, rank, world
        self.length = self.mixture.sources[0].windows.length
        self._draw = self.mixture.draw(seed)
        # A source's order hangs on its name, not on its place, so that adding a source does not reshuffle the others.
        self._keys = [zlib.crc32(source.name.encode("utf-8")) for source in self.mixture.sources]
        self._orders = [
            RowOrder(source.windows.num_rows, shuffle, seed, key) for source, key in zip(self.mixture.sources, self._keys, strict=True)
        ]

    @property
    def tokens_per_batch(self) -> int:
        """Positions of the global batch, padding included."""
        return self.batch_size * self.length

    @property
    def num_tokens(self) -> int:
        """Tokens of all training sources."""
        return self.mixture.num_tokens

    def batch(self, step: int) -> PackedBatch:
        """This rank's rows of global batch `step`, counted from 0."""
        assert step >= 0
        share = self.batch_size // self.world
        owners = self._draw.owners(step * self.batch_size + self.rank * share, share)
        groups = []
        for source, where, draws in group(owners):
            windows = self.mixture.sources[source].windows
            rows, epochs = self._orders[source].rows(draws), draws // windows.num_rows
            turns = {epoch: self._turn(source, epoch) for epoch in set(epochs.tolist())}
            spans = [windows.spans(row, turns[epoch]) for row, epoch in zip(rows.tolist(), epochs.tolist(), strict=True)]
            groups.append((where, assemble(windows, spans)))
        return PackedBatch.from_rows(groups[0][1] if len(groups) == 1 else _interleave(groups, share))

    def validation(self, max_batches: int | None = None) -> Iterator[PackedBatch]:
        """The held-out rows in a fixed order, once each; every batch has the same shape, the last being filled up with empty rows.

        max_batches   at most this many batches, of rows spread evenly over each source; None covers everything.
        Each batch holds rows of one source. Raises UserError where nothing was held out.
        """
        if self.valid is None:
            raise UserError("there is no validation data; prepare the data with --valid SHARE, or give a valid.jsonl beside train.jsonl.")
        share = self.batch_size // self.world
        windows = [source.windows for source in self.valid.sources]
        full = [-(-each.num_rows // self.batch_size) for each in windows]
        for each, batches in zip(windows, _limit(full, max_batches), strict=True):
            chosen = min(each.num_rows, batches * self.batch_size)
            for number in range(batches):
                first = number * self.batch_size + self.rank * share
                indices = range(first, first + share)
                spans = [each.spans(index * each.num_rows // chosen, 0) if index < chosen else EMPTY for index in indices]
                yield PackedBatch.from_rows(assemble(each, spans))

    def report(self, steps: int | None = None) -> list[dict[str, Any]]:
        """The data table (see `Mixture.report`) after `steps` batches; None is as many as hold every token once."""
        steps = -(-self.num_tokens // self.tokens_per_batch) if steps is None else steps
        return self.mixture.report(steps * self.batch_size, self.seed)

    def describe(self) -> dict[str, Any]:
        """What determines the batches, JSON-ready: a resumed run must find the same. Ranks are left out, as they do not matter."""
        return {
            "packing": self.mixture.sources[0].windows.mode,
            "length": self.length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "tokenizer": self.mixture.sources[0].windows.store.tokenizer_sha256,
            "sources": [
                {"name": source.name, "proportion": source.proportion, "rows": source.windows.num_rows, "data": source.windows.store.digest}
                for source in self.mixture.sources
            ],
        }

    def _turn(self, source: int, epoch: int) -> int:
        """By how many tokens the cuts of an epoch are moved."""
        return mix(self.seed, self._keys[source], epoch, 1) % self.mixture.sources[source].windows.store.num_tokens if self.shuffle else 0


def _interleave(groups: Sequence[tuple[np.ndarray, Rows]], count: int) -> Rows:
    """Rows of several sources, each at its place in the batch."""

    def place(arrays: Sequence[np.ndarray]) -> np.ndarray:
        out = np.empty((count, *arrays[0].shape[1:]), arrays[0].dtype)
        for (where, _), array in zip(groups, arrays, strict=True):
            out[where] = array
        return out

    parts = [rows for _, rows in groups]
    segments = [rows.segments for rows in parts if rows.segments is not None]
    return Rows(
        place([rows.tokens for rows in parts]),
        place([rows.targets for rows in parts]),
        place([rows.positions for rows in parts]),
        place(segments) if segments else None,
        place([rows.loss_mask for rows in parts]),
        place([rows.lengths for rows in parts]),
        place([rows.row_bytes for rows in parts]),
    )


def _limit(full: Sequence[int], most: int | None) -> list[int]:
    """Batches of each source when `most` in all are allowed: in proportion, and at least one each."""
    total = sum(full)
    if most is None or most >= total:
        return list(full)
    if most < len(full):
        raise UserError(f"validation is limited to {most} batches, but there are {len(full)} sources; allow at least one batch each.")
    # One each, the rest dealt out by the largest share still missing.
    given = [1] * len(full)
    for _ in range(most - len(full)):
        given[max(range(len(full)), key=lambda index: full[index] / given[index] if given[index] < full[index] else 0.0)] += 1
    return given
