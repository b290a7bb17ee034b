"""Next-token prediction: pretraining, and fine-tuning on completions where the batch's mask says so."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from weft.data.packing import PackedBatch
from weft.nn import Model, Step
from weft.objectives.auxiliary import Auxiliary, statistics
from weft.objectives.cross_entropy import Smoothing, linear_cross_entropy
from weft.objectives.head import head_of
from weft.objectives.mtp import WEIGHT, mtp_counts, mtp_terms
from weft.objectives.settings import NextTokenSettings
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Models, Role, Term
from weft.train.watched import LOSS


class NextToken:
    """L1(U) = -sum log P(u_i | u_<i) over the scored tokens (Radford et al. 2018, equation 1), as a mean over their global count.

    Term `next_token`. Metrics: `bits_per_byte` where bytes are known, and, where the loss is smoothed, the plain `nll` in nats a token.
    For a model with modules for multi-token prediction, `depth` of them, terms `mtp_1` … beside it (`weft.objectives.mtp`); for one whose
    layers hand out losses, such as experts, theirs (`weft.objectives.auxiliary`), which takes the model's `spec`.
    """

    name = "next_token"
    watched = (LOSS,)

    def __init__(
        self, settings: NextTokenSettings | None = None, chunk: int | None = None, depth: int = 0, spec: ModelSpec | None = None
    ) -> None:
        settings = settings or NextTokenSettings()
        self.mtp_weight = WEIGHT if settings.mtp is None else settings.mtp
        self.depth = depth if self.mtp_weight else 0
        self.auxiliary = Auxiliary(spec, self.depth)
        self.smoothing, self.chunk = Smoothing(settings.label_smoothing, settings.z_loss), chunk

    @property
    def roles(self) -> Mapping[str, Role]:
        return {POLICY: Role(trained=True, reads=frozenset({"head", "mtp"} if self.depth else {"head"}))}

    def rollout(self, engine: Any, batch: PackedBatch) -> PackedBatch:
        return batch

    def minibatches(self, batch: PackedBatch) -> Sequence[PackedBatch]:
        return (batch,)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {self.name: batch.num_targets, **mtp_counts(batch, self.depth), **self.auxiliary.counts(batch.num_tokens)}

    def step(self, model: Model, batch: PackedBatch) -> Step:
        """What the model is told besides the tokens."""
        return step_of(batch)

    def loss(self, models: Models, batch: PackedBatch) -> tuple[dict[str, Term], dict[str, Term]]:
        model = models[POLICY]
        step = self.step(model, batch)
        output = model(batch.tokens, step, ahead=self.depth > 0)
        mask = batch.loss_mask.flatten()
        targets = batch.targets.flatten().clamp(min=0)
        sums = linear_cross_entropy(output.hidden.flatten(0, 1), head_of(model), targets, mask, self.smoothing, self.chunk)
        count = mask.sum()
        metrics = {"nll": Term(sums.nll, count)} if self.smoothing != Smoothing() else {}
        if batch.row_bytes is not None:
            metrics["bits_per_byte"] = Term(sums.nll / math.log(2), batch.row_bytes.sum())
        ahead = mtp_terms(model, output, batch, self.depth, self.mtp_weight, self.smoothing)
        terms = {self.name: Term(sums.loss, count), **ahead, **self.auxiliary.terms(output.aux, step.valid)}
        return terms, {**metrics, **statistics(POLICY, output.aux)}


def step_of(batch: PackedBatch) -> Step:
    """What a model is told about a packed batch besides its tokens."""
    if batch.segments is not None:
        return Step.packed(batch.positions, batch.segments, batch.lengths)
    lengths: Tensor | None = batch.lengths
    return Step.parallel(batch.tokens, lengths)
