"""Whole texts as tensors, a row each, padded on the right: batches of classified texts, and of answers that were compared.

What the trainer cuts into micro-batches are examples, so answers that are compared stay together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

MULTIPLE = 8  # rows are as wide as a multiple of this, so that fewer different shapes occur


class Text(Protocol):
    """Ids, and which of them a model is trained to say."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def trained(self) -> Sequence[bool]: ...


@dataclass(frozen=True)
class Classified:
    """A text and the number of its class."""

    text: Text
    label: int

    @property
    def num_tokens(self) -> int:
        return len(self.text.ids)


@dataclass(frozen=True)
class Compared:
    """Answers to one prompt, prompts included, and which of them was liked better than which.

    pairs    (chosen, rejected), counting in `answers`.    margins  of each pair; 0 where nobody said how much better.
    """

    answers: tuple[Text, ...]
    pairs: tuple[tuple[int, int], ...]
    margins: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)


@dataclass(frozen=True, eq=False)
class TextRows:
    """R texts, a row each.

    tokens   [R, T] int64   ids to read; 0 on padding.
    targets  [R, T] int64   the id that follows; 0 where none does.
    mask     [R, T] bool    where the id that follows is one to be trained on.
    lengths  [R] int64      tokens before the padding.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    lengths: Tensor

    @classmethod
    def lay(cls, texts: Sequence[Text], width: int | None = None) -> "TextRows":
        """Rows of `width` tokens, or of as many as the longest text needs."""
        lengths = torch.tensor([len(text.ids) for text in texts])
        width = width or _round_up(int(lengths.max()))
        tokens, trained = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens[row, : len(text.ids)] = torch.tensor(text.ids)
            trained[row, : len(text.ids)] = torch.tensor(text.trained)
        after = torch.zeros_like(tokens[:, :1])
        return cls(tokens, torch.cat([tokens[:, 1:], after], 1), torch.cat([trained[:, 1:], after.bool()], 1), lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        return int(self.mask.sum())

    def cut(self, start: int, stop: int, keep_width: bool) -> "TextRows":
        """Some of the rows, and of their columns those that are needed, unless all are to be kept."""
        lengths = self.lengths[start:stop]
        width = self.tokens.shape[1] if keep_width else min(self.tokens.shape[1], _round_up(int(lengths.max())))
        place = slice(start, stop), slice(width)
        return TextRows(self.tokens[place], self.targets[place], self.mask[place], lengths)

    def to(self, device: Any) -> "TextRows":
        return _moved(self, device)


@dataclass(frozen=True, eq=False)
class ClassifiedBatch:
    """Texts with their classes: labels [R] int64. With `fixed`, parts are as wide as the whole, for a compiler."""

    texts: TextRows
    labels: Tensor
    fixed: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    def rows(self, start: int, stop: int) -> "ClassifiedBatch":
        return ClassifiedBatch(self.texts.cut(start, stop, self.fixed), self.labels[start:stop], self.fixed)

    def to(self, device: Any) -> "ClassifiedBatch":
        return _moved(self, device)


@dataclass(frozen=True, eq=False)
class ComparedBatch:
    """Examples of compared answers; the answers of an example lie in adjacent rows.

    texts    R answers, each read once, however many pairs it is in.
    chosen, rejected  [P] int64   their rows.
    margins  [P] float32.
    company  [P] int64     pairs of the same example: what each is divided by where every example counts alike (InstructGPT, equation 1).
    num_answers, num_pairs        of each example, on the CPU.
    """

    texts: TextRows
    chosen: Tensor
    rejected: Tensor
    margins: Tensor
    company: Tensor
    num_answers: tuple[int, ...]
    num_pairs: tuple[int, ...]
    fixed: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.num_answers)

    def rows(self, start: int, stop: int) -> "ComparedBatch":
        """Examples start … stop - 1 as a batch of their own."""
        first, last = sum(self.num_answers[:start]), sum(self.num_answers[:stop])
        pairs = slice(sum(self.num_pairs[:start]), sum(self.num_pairs[:stop]))
        return ComparedBatch(
            self.texts.cut(first, last, self.fixed),
            self.chosen[pairs] - first,
            self.rejected[pairs] - first,
            self.margins[pairs],
            self.company[pairs],
            self.num_answers[start:stop],
            self.num_pairs[start:stop],
            self.fixed,
        )

    def to(self, device: Any) -> "ComparedBatch":
        return _moved(self, device)


def collate_classified(examples: Sequence[Classified], width: int | None = None) -> ClassifiedBatch:
    """A batch, longest texts first, so that micro-batches hold texts of like lengths; `width` fixes that of every row."""
    ordered = sorted(examples, key=lambda example: -example.num_tokens)
    texts = TextRows.lay([example.text for example in ordered], width)
    return ClassifiedBatch(texts, torch.tensor([example.label for example in ordered]), fixed=width is not None)


def collate_compared(examples: Sequence[Compared], width: int | None = None) -> ComparedBatch:
    """A batch, longest answers first; `width` fixes that of every row."""
    ordered = sorted(examples, key=lambda example: -max(len(answer.ids) for answer in example.answers))
    chosen, rejected, margins, company, first = [], [], [], [], 0
    for example in ordered:
        chosen += [first + better for better, _ in example.pairs]
        rejected += [first + worse for _, worse in example.pairs]
        margins += list(example.margins)
        company += [len(example.pairs)] * len(example.pairs)
        first += len(example.answers)
    return ComparedBatch(
        TextRows.lay([answer for example in ordered for answer in example.answers], width),
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.tensor(margins, dtype=torch.float32),
        torch.tensor(company),
        tuple(len(example.answers) for example in ordered),
        tuple(len(example.pairs) for example in ordered),
        fixed=width is not None,
    )


B = TypeVar("B", bound=TextRows | ClassifiedBatch | ComparedBatch)


def _moved(batch: B, device: Any) -> B:
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved: dict[str, Any] = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor | TextRows)}
    return replace(batch, **moved)


def _round_up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
