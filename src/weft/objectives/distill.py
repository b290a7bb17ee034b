"""Distillation from logits: a student learns all that a teacher would have said at a token, not only what is there (Hinton et al. 2015)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from weft.data.packing import PackedBatch
from weft.nn import Model
from weft.objectives.auxiliary import Auxiliary, statistics
from weft.objectives.cross_entropy import linear_cross_entropy
from weft.objectives.divergence import Divergence, Side, linear_divergence
from weft.objectives.head import Head, head_of
from weft.objectives.next_token import step_of
from weft.objectives.settings import DistillSettings
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Models, Role, Term
from weft.train.watched import LOSS

TEACHER = "teacher"


class Distill:
    """alpha T^2 D(teacher, student) + (1 - alpha) L1, both means over the scored tokens: the divergence of their distributions at
    temperature T, and next-token prediction. T^2 keeps the first one's gradient as large as it is at T = 1 (section 2).

    Terms `distill` (which is T^2 D) and, unless alpha is 1, `next_token`. Metrics of the student: `nll` in nats a token, and, where bytes
    are known, `bits_per_byte`.
    """

    roles: Mapping[str, Role] = {POLICY: Role(trained=True), TEACHER: Role(trained=False)}
    watched = (LOSS,)

    def __init__(self, settings: DistillSettings, spec: ModelSpec | None = None, chunk: int | None = None) -> None:
        self.alpha, self.chunk = settings.alpha, chunk
        self.divergence = Divergence(settings.divergence, settings.temperature, settings.mixture)
        self.auxiliary = Auxiliary(spec)

    def rollout(self, engine: Any, batch: PackedBatch) -> PackedBatch:
        return batch

    def minibatches(self, batch: PackedBatch) -> Sequence[PackedBatch]:
        return (batch,)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        data = {"next_token": batch.num_targets} if self.alpha < 1 else {}
        return {"distill": batch.num_targets, **data, **self.auxiliary.counts(batch.num_tokens)}

    def loss(self, models: Models, batch: PackedBatch) -> tuple[dict[str, Term], dict[str, Term]]:
        student, step = models[POLICY], step_of(batch)
        with torch.no_grad():
            lesson = models[TEACHER](batch.tokens, step_of(batch)).hidden.flatten(0, 1)
        output = student(batch.tokens, step)
        hidden, mask = output.hidden.flatten(0, 1), batch.loss_mask.flatten()
        ours, theirs = common_heads(student, models[TEACHER])
        divergence = linear_divergence(Side(hidden, ours), Side(lesson, theirs), mask, self.divergence, self.chunk)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha < 1):
            sums = linear_cross_entropy(hidden, head_of(student), batch.targets.flatten().clamp(min=0), mask, chunk=self.chunk)
        count = mask.sum()
        terms = {"distill": Term(self.divergence.temperature**2 * divergence, count, self.alpha)}
        if self.alpha < 1:
            terms["next_token"] = Term(sums.loss, count, 1 - self.alpha)
        metrics = {"nll": Term(sums.nll, count), **statistics(POLICY, output.aux)}
        if batch.row_bytes is not None:
            metrics["bits_per_byte"] = Term(sums.nll / math.log(2), batch.row_bytes.sum())
        return {**terms, **self.auxiliary.terms(output.aux, step.valid)}, metrics


def common_heads(student: Model, teacher: Model) -> tuple[Head, Head]:
    """The heads of two models of one tokenizer, cut to the ids that both have: a table may be padded beyond its tokenizer's."""
    heads = head_of(student), head_of(teacher)
    ids = min(head.weight.shape[0] for head in heads)
    ours, theirs = (Head(h.weight[:ids], None if h.bias is None else h.bias[:ids], h.softcap) for h in heads)
    return ours, theirs
