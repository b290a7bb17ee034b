"""Whole texts through a model: hidden states, and what a second head says at each text's last token."""

from typing import NamedTuple

import torch
from torch import Tensor

from weft.data.collate import TextRows
from weft.nn import Model, Step
from weft.nn.model import Output


class Read(NamedTuple):
    """A pass over rows: what the model returned, and which tokens are no padding, bool [R, T]."""

    output: Output
    valid: Tensor


def read_texts(model: Model, texts: TextRows) -> Read:
    """One parallel pass; every row is a document of its own."""
    step = Step.parallel(texts.tokens, texts.lengths)
    return Read(model(texts.tokens, step), step.valid)


def last_scores(model: Model, hidden: Tensor, lengths: Tensor) -> Tensor:
    """What the score head says of whole texts, [R, outputs]: hidden [R, T, D] at the last of `lengths` [R] tokens."""
    assert model.score is not None, "the model has no score head"
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    scores: Tensor = model.score(hidden[rows, lengths - 1])
    return scores
