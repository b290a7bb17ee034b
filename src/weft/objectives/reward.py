"""Reward models: a number a text, such that the answer people liked better has the larger one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from weft.data.collate import ComparedBatch
from weft.objectives.auxiliary import Auxiliary, statistics
from weft.objectives.rows import last_scores, read_texts
from weft.objectives.settings import RewardSettings
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Models, Role, Term
from weft.train.watched import ACCURACY, Watched


def bradley_terry(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) of each pair, in nats, all [P]: how surprised the model of Bradley and Terry (1952) is by
    the verdict (InstructGPT, Ouyang et al. 2022, equation 1; the margin is Llama 2's, Touvron et al. 2023b, equation 2)."""
    return -F.logsigmoid(chosen - rejected - margins)


class Reward:
    """The mean of `bradley_terry` over the pairs of an example, and of that over examples: a prompt with many ranked answers counts as much
    as one with two, and each answer is read once (InstructGPT, section 3.5).

    Term `ranking`, and with `centre` a term of that weight, the squared sum of a pair's rewards (Eisenstein et al. 2023). Metrics over
    pairs: `accuracy`, the share whose chosen answer has the larger reward, and `margin`, how much larger it is; `reward`, the mean over
    answers.
    """

    roles: Mapping[str, Role] = {POLICY: Role(trained=True, reads=frozenset({"score"}))}
    watched = (Watched("loss", unit="nats a pair"), ACCURACY)

    def __init__(self, settings: RewardSettings | None = None, spec: ModelSpec | None = None) -> None:
        self.centre = (settings or RewardSettings()).centre
        self.auxiliary = Auxiliary(spec)

    def rollout(self, engine: Any, batch: ComparedBatch) -> ComparedBatch:
        return batch

    def minibatches(self, batch: ComparedBatch) -> Sequence[ComparedBatch]:
        return (batch,)

    def counts(self, batch: ComparedBatch) -> dict[str, int]:
        centre = {"centre": batch.num_rows} if self.centre else {}
        return {"ranking": batch.num_rows, **centre, **self.auxiliary.counts(batch.texts.num_tokens)}

    def loss(self, models: Models, batch: ComparedBatch) -> tuple[dict[str, Term], dict[str, Term]]:
        model, count = models[POLICY], float(batch.num_rows)
        output, valid = read_texts(model, batch.texts)
        rewards = last_scores(model, output.hidden, batch.texts.lengths)[:, 0]
        chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]
        terms = {"ranking": Term((bradley_terry(chosen, rejected, batch.margins) / batch.company).sum(), count)}
        if self.centre:
            terms["centre"] = Term(((chosen + rejected).square() / batch.company).sum(), count, self.centre)
        pairs = float(len(chosen))
        metrics = {
            "accuracy": Term((chosen > rejected).sum(), pairs),
            "margin": Term((chosen - rejected).sum(), pairs),
            "reward": Term(rewards.sum(), float(len(rewards))),
            **statistics(POLICY, output.aux),
        }
        return {**terms, **self.auxiliary.terms(output.aux, valid)}, metrics
