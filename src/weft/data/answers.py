"""A model's answers to prompts as tensors: what an online objective learns from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from weft.data.collate import TextRows
from weft.data.packing import PackedBatch


@dataclass(frozen=True)
class Answered:
    """A prompt with an answer; the answer's tokens are what is learned."""

    prompt: Sequence[int]
    answer: Sequence[int]

    @property
    def ids(self) -> Sequence[int]:
        return [*self.prompt, *self.answer]

    @property
    def trained(self) -> Sequence[bool]:
        return [False] * len(self.prompt) + [True] * len(self.answer)


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """R answers with their prompts, a row each.

    texts    `mask` is True at the places whose next token belongs to an answer that is learned from.
    columns  by name, [R] float32: what is known of whole answers, such as their rewards.
    tables   by name, [R, T] float32: what is known of each place, such as its advantage.
    text     rows of other data that are learned from beside the answers, or None.
    seed     from which the order of inner epochs is drawn.
    """

    texts: TextRows
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    text: PackedBatch | None = None
    seed: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.texts.lengths)

    def rows(self, start: int, stop: int) -> "AnswerBatch":
        """Rows start … stop - 1, as wide as they need to be, and of the other data a like share."""
        texts = self.texts.cut(start, stop, keep_width=False)
        width = texts.tokens.shape[1]
        columns = {name: value[start:stop] for name, value in self.columns.items()}
        tables = {name: value[start:stop, :width] for name, value in self.tables.items()}
        text = self.text
        if text is not None:
            first, last = (at * text.num_rows // max(1, self.num_rows) for at in (start, stop))
            text = text.rows(first, last) if last > first else None
        return replace(self, texts=texts, columns=columns, tables=tables, text=text)

    def pick(self, rows: Tensor) -> "AnswerBatch":
        """Rows [K] int64 in this order; other data stays whole."""
        texts = self.texts
        picked = TextRows(texts.tokens[rows], texts.targets[rows], texts.mask[rows], texts.lengths[rows])
        columns = {name: value[rows] for name, value in self.columns.items()}
        return replace(self, texts=picked, columns=columns, tables={name: value[rows] for name, value in self.tables.items()})

    def longest_first(self) -> "AnswerBatch":
        """The same rows, so that those of a micro-batch are of like lengths."""
        return self.pick(torch.argsort(self.texts.lengths, descending=True, stable=True))

    def to(self, device: Any) -> "AnswerBatch":
        return replace(
            self,
            texts=self.texts.to(device),
            columns={name: value.to(device) for name, value in self.columns.items()},
            tables={name: value.to(device) for name, value in self.tables.items()},
            text=None if self.text is None else self.text.to(device),
        )

    def updates(self, epochs: int, minibatches: int) -> list["AnswerBatch"]:
        """The batches of an inner loop: in every epoch all rows once, in a new order, as `minibatches` batches. Rows of other data are
        dealt out over all of them."""
        count, total = self.num_rows, epochs * minibatches
        assert minibatches <= count, "more minibatches than rows"
        if total == 1:
            return [self.longest_first()]
        batches: list[AnswerBatch] = []
        for epoch in range(epochs):
            order = torch.randperm(count, generator=torch.Generator().manual_seed((self.seed + epoch) % 2**63))
            for part in order.tensor_split(minibatches):
                text, number = self.text, len(batches)
                if text is not None:
                    text = text.rows(number * text.num_rows // total, (number + 1) * text.num_rows // total)
                batches.append(replace(self.pick(part), text=text).longest_first())
        return batches
