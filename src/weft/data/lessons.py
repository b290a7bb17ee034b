"""Texts of which a student may write the answers itself, before a teacher looks at them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.data.collate import Text, TextRows
from weft.data.packing import PackedBatch
from weft.data.prompts import PromptBatch, PromptBatches, PromptExample


@dataclass(frozen=True)
class Lesson(PromptExample):
    """A prompt, and the whole text that the data goes on with."""

    text: Any = None  # `Text`; what a record is encoded as


class LessonBatches(PromptBatches):
    """Batches of lessons; held-out ones are the data's texts."""

    def validation(self, max_batches: int | None = None) -> Iterator[Any]:
        for batch in super().validation(max_batches):
            yield given_texts(batch)


def given_texts(batch: PromptBatch) -> PackedBatch:
    """The data's own texts of a batch."""
    return rows_of([example.text for example in batch.examples if isinstance(example, Lesson)])


def rows_of(texts: Sequence[Text]) -> PackedBatch:
    """Texts as rows of one document each, the longest first."""
    laid = TextRows.lay(sorted(texts, key=lambda text: -len(text.ids)))
    positions = torch.arange(laid.tokens.shape[1]).expand_as(laid.tokens)
    return PackedBatch(laid.tokens, laid.targets, positions, None, laid.mask, 0, laid.lengths)


def is_drawn(batch: PromptBatch, share: float) -> bool:
    """Whether a step is one of the `share` of all steps: a function of its luck, so that a resumed run and every process draw alike."""
    return random.Random(batch.luck).random() < share
