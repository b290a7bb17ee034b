"""Classification by a linear head on the last token, with the language model's own loss beside it (Radford et al. 2018, section 3.2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F

from weft.data.collate import ClassifiedBatch
from weft.objectives.auxiliary import Auxiliary, statistics
from weft.objectives.cross_entropy import linear_cross_entropy
from weft.objectives.head import head_of
from weft.objectives.rows import last_scores, read_texts
from weft.objectives.settings import ClassifySettings
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Models, Role, Term
from weft.train.watched import ACCURACY, Watched


class Classify:
    """L3 = L2 + lm * L1 (equation 5): the negative log-likelihood of the class (equation 4), a mean over texts, and that of the text's own
    tokens (equation 1), a mean over tokens.

    Terms `class` and, unless its weight is 0, `lm`. Metric `accuracy`, the share of texts whose likeliest class is theirs.
    """

    watched = (Watched("loss", unit="nats"), ACCURACY)

    def __init__(self, settings: ClassifySettings | None = None, spec: ModelSpec | None = None) -> None:
        self.lm = (settings or ClassifySettings()).lm
        reads = frozenset({"score", "head"} if self.lm else {"score"})
        self.roles: Mapping[str, Role] = {POLICY: Role(trained=True, reads=reads)}
        self.auxiliary = Auxiliary(spec)

    def rollout(self, engine: Any, batch: ClassifiedBatch) -> ClassifiedBatch:
        return batch

    def minibatches(self, batch: ClassifiedBatch) -> Sequence[ClassifiedBatch]:
        return (batch,)

    def counts(self, batch: ClassifiedBatch) -> dict[str, int]:
        lm = {"lm": batch.texts.num_targets} if self.lm else {}
        return {"class": batch.num_rows, **lm, **self.auxiliary.counts(batch.texts.num_tokens)}

    def loss(self, models: Models, batch: ClassifiedBatch) -> tuple[dict[str, Term], dict[str, Term]]:
        model, texts, count = models[POLICY], batch.texts, float(batch.num_rows)
        output, valid = read_texts(model, texts)
        scores = last_scores(model, output.hidden, texts.lengths)
        terms = {"class": Term(F.cross_entropy(scores, batch.labels, reduction="sum"), count)}
        if self.lm:
            mask = texts.mask.flatten()
            sums = linear_cross_entropy(output.hidden.flatten(0, 1), head_of(model), texts.targets.flatten(), mask)
            terms["lm"] = Term(sums.loss, mask.sum(), self.lm)
        right = (scores.argmax(-1) == batch.labels).sum()
        metrics = {"accuracy": Term(right, count), **statistics(POLICY, output.aux)}
        return {**terms, **self.auxiliary.terms(output.aux, valid)}, metrics
