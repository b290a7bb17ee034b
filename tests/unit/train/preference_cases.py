"""Texts, pairs and batches of random ids that the tests of offline objectives share."""

from dataclasses import dataclass

import torch
import train_cases as cases

from weft.data.collate import Classified, ClassifiedBatch, Compared, ComparedBatch, collate_classified, collate_compared
from weft.nn import Model, add_score


@dataclass(frozen=True)
class Text:
    """Ids, and whether each is trained on."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


def text(seed: int, length: int, prompt: int = 0) -> Text:
    """Random ids of which those after the prompt, the first one never, are trained on."""
    ids = torch.randint(cases.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Text(tuple(ids), tuple(index >= max(prompt, 1) for index in range(length)))


def pair(seed: int, prompt: int, chosen: int, rejected: int, margin: float = 0.0) -> Compared:
    """Two answers of so many tokens to a prompt of so many."""
    asked = text(seed, prompt).ids
    answers = [text(seed + 100 * n, prompt + length, prompt) for n, length in ((1, chosen), (2, rejected))]
    made = tuple(Text((*asked, *answer.ids[prompt:]), answer.trained) for answer in answers)
    return Compared(made, ((0, 1),), (margin,))


PAIRS = [pair(1, 5, 7, 3, 0.5), pair(2, 2, 4, 21), pair(3, 9, 1, 2, 1.0), pair(4, 3, 6, 6), pair(5, 1, 12, 2)]
# Three answers to one prompt, two of them in two pairs each.
RANKED = Compared((text(6, 9, 4), text(7, 13, 4), text(8, 6, 4)), ((0, 1), (1, 2), (0, 2)), (0.0, 0.25, 0.0))
LABELLED = [Classified(text(seed, length), label) for seed, length, label in ((1, 9, 0), (2, 4, 2), (3, 17, 1), (4, 2, 2), (5, 11, 0))]


def compared(width: int | None = None) -> ComparedBatch:
    return collate_compared([*PAIRS, RANKED], width)


def classified(width: int | None = None) -> ClassifiedBatch:
    return collate_classified(LABELLED, width)


def scoring(outputs: int, dtype: torch.dtype = torch.float64) -> Model:
    """A tiny model with a score head."""
    return add_score(cases.model_of(dtype), outputs, seed=2)
