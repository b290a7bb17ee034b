"""Packed rows as tensors: what a training step reads."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from weft.data.assemble import Rows


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B rows of T tokens in which no document sees another.

    tokens     [B, T] int64   ids to read; 0 on padding.
    targets    [B, T] int64   the id that follows in the same document; -100 where `loss_mask` is False.
    positions  [B, T] int64   restart at 0 at each document and at each piece of one that is longer than a row.
    segments   [B, T] int64   0, 1, 2 … along a row, one number a document or piece, padding being the last; None where a row is one
                              sequence from position 0 with right padding only (modes `pad` and `stream`).
    loss_mask  [B, T] bool    False on padding, on tokens whose target would be in the next document, and where the target belongs to a
                              prompt.
    num_bytes  int            UTF-8 bytes of text that the scored targets stand for: nats / ln 2 / num_bytes is bits per byte. End
                              marks are scored and stand for no bytes.
    lengths    [B] int64      tokens of each row before its padding; 0 marks a row that only fills up the last batch. None is T for all.
    row_bytes  [B] int64      `num_bytes` row by row, None where that is not known.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    segments: Tensor | None
    loss_mask: Tensor
    num_bytes: int
    lengths: Tensor | None = None
    row_bytes: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Rows) -> "PackedBatch":
        """Wrap arrays without copying them."""
        segments = None if rows.segments is None else torch.from_numpy(rows.segments)
        tokens, targets, positions = (torch.from_numpy(array) for array in (rows.tokens, rows.targets, rows.positions))
        mask, lengths, row_bytes = (torch.from_numpy(array) for array in (rows.loss_mask, rows.lengths, rows.row_bytes))
        return cls(tokens, targets, positions, segments, mask, int(rows.row_bytes.sum()), lengths, row_bytes)

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Positions that are scored: the count that a loss is divided by."""
        return int(self.loss_mask.sum())

    @property
    def num_tokens(self) -> int:
        """Positions that are read: all but padding."""
        return self.tokens.numel() if self.lengths is None else int(self.lengths.sum())

    def rows(self, start: int, stop: int) -> "PackedBatch":
        """Rows start … stop - 1 as a batch of their own; its `num_bytes` is 0 where `row_bytes` is not known."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        cut = {name: value[start:stop] for name, value in parts.items() if isinstance(value, Tensor)}
        num_bytes = 0 if self.row_bytes is None else int(self.row_bytes[start:stop].sum())
        return PackedBatch(**(parts | cut | {"num_bytes": num_bytes}))

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in parts.items() if isinstance(value, Tensor)}
        return PackedBatch(**(parts | moved))
