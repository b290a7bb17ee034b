"""Virtual tokens before every text of a batch, for models that have some (`weft.nn.adapters.virtual`).

They are put there once a batch is made, so that what a batch holds, how it is packed and where it goes on do not depend on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weft.data.collate import TextRows
from weft.data.packing import PackedBatch
from weft.errors import UserError


class VirtualBatches:
    """The batches of a source with virtual tokens `ids` before each of their texts; for the rest the source itself."""

    def __init__(self, source: Any, ids: Sequence[int]) -> None:
        self.source, self.ids = source, tuple(ids)
        self.valid, self.length = source.valid, source.length

    @property
    def tokens_per_batch(self) -> int:
        tokens: int = self.source.tokens_per_batch
        return tokens

    def batch(self, step: int) -> Any:
        return with_virtual(self.source.batch(step), self.ids)

    def validation(self, max_batches: int | None = None) -> Iterator[Any]:
        for batch in self.source.validation(max_batches):
            yield with_virtual(batch, self.ids)

    def report(self, steps: int | None = None) -> list[dict[str, Any]]:
        facts: list[dict[str, Any]] = self.source.report(steps)
        return facts

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = self.source.describe()
        return described


def with_virtual(batch: Any, ids: Sequence[int]) -> Any:
    """A batch whose texts begin with these ids, which are read and never predicted. Raises UserError for a kind of batch without texts."""
    if isinstance(batch, PackedBatch):
        return _in_packed(batch, torch.tensor(ids))
    if isinstance(batch, TextRows):
        return _in_rows(batch, torch.tensor(ids))
    parts = {f.name: getattr(batch, f.name) for f in fields(batch)} if is_dataclass(batch) else {}
    texts = {name: with_virtual(part, ids) for name, part in parts.items() if isinstance(part, TextRows | PackedBatch)}
    if not texts:
        raise UserError("adapter is prompt or prefix, which this objective does not train; take lora.")
    return replace(batch, **texts)


def _in_rows(rows: TextRows, ids: Tensor) -> TextRows:
    before = ids.expand(len(rows.tokens), -1)
    nothing = torch.zeros_like(before)
    return replace(
        rows,
        tokens=torch.cat([before, rows.tokens], 1),
        targets=torch.cat([nothing, rows.targets], 1),
        mask=torch.cat([nothing.bool(), rows.mask], 1),
        lengths=rows.lengths + len(ids),
    )


def _in_packed(batch: PackedBatch, ids: Tensor) -> PackedBatch:
    """Every document, and every piece of one, begins at a position 0; what was at place t moves by as many ids as began until then."""
    rows, width = batch.tokens.shape
    lengths = torch.full((rows,), width) if batch.lengths is None else batch.lengths
    live = torch.arange(width) < lengths[:, None]
    begins = live & (batch.positions == 0)
    if batch.segments is None:
        begins = begins & (torch.arange(width) == 0)
    count, most = len(ids), int(begins.sum(1).max())
    place = torch.arange(width) + count * begins.cumsum(1)
    total = width + count * most

    def moved(values: Tensor, fill: Any) -> Tensor:
        return torch.full((rows, total), fill, dtype=values.dtype).scatter(1, place, values)

    row, at = begins.nonzero(as_tuple=True)
    own = place[row, at][:, None] - count + torch.arange(count)  # [starts, n]
    tokens, positions = moved(batch.tokens, 0), moved(batch.positions + count * live, 0)
    tokens[row[:, None], own], positions[row[:, None], own] = ids, torch.arange(count)
    segments, before = None, batch.segments
    if before is not None:
        padding = before.amax(1) + (lengths == width)  # a number of its own, where the row has padding only now
        segments = padding[:, None].expand(rows, total).clone().scatter(1, place, before)
        segments[row[:, None], own] = before[row, at][:, None].expand(-1, count)
    return replace(
        batch,
        tokens=tokens,
        targets=moved(batch.targets, -100),
        positions=positions,
        segments=segments,
        loss_mask=moved(batch.loss_mask, False),
        lengths=lengths + count * begins.sum(1),
    )
