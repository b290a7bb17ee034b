"""Direct preference optimisation: preferences straight into a policy, without a reward model (Rafailov et al. 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.data.collate import ComparedBatch, TextRows
from weft.nn import Model
from weft.nn.model import Output
from weft.objectives.auxiliary import Auxiliary, statistics
from weft.objectives.head import head_of
from weft.objectives.log_probs import linear_log_probs, token_log_probs
from weft.objectives.reference import REFERENCE, reference_in, reference_roles
from weft.objectives.rows import read_texts
from weft.objectives.settings import DPOSettings
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Models, Role, Term
from weft.train.watched import ACCURACY, Watched


def dpo_losses(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair, [P], from the log-ratios log(policy / reference) of its answers (equation 7). With label smoothing e a pair is
    taken to be the wrong way round with probability e (Mitchell 2023, cDPO)."""
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_losses(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Azar et al. (2023), equation 17, with tau = beta: the gap between log-ratios is drawn to 1 / (2 beta) and not beyond it. The
    log-ratios are means over an answer's tokens, as in the authors' experiments, so that long answers do not weigh more."""
    return (chosen - rejected - 1 / (2 * beta)).square()


class DPO:
    """`dpo_losses`, or `ipo_losses`, as a mean over pairs.

    Term `dpo`, and with `nll` a term of that weight: the chosen answers' negative log-likelihood, a mean over their tokens (Llama 3,
    Grattafiori et al. 2024, section 4.1.4). Metrics over pairs, of the implicit rewards beta * log(policy / reference): `accuracy`, the
    share whose chosen answer has the larger one; `margin`, their difference; `chosen_reward` and `rejected_reward`.
    """

    watched = (Watched("loss"), ACCURACY)  # nats a pair, but for IPO

    def __init__(self, settings: DPOSettings | None = None, spec: ModelSpec | None = None, own_reference: bool = True) -> None:
        """own_reference  whether a model of its own is the reference, or the policy without its adapter."""
        self.settings = settings or DPOSettings()
        self.auxiliary = Auxiliary(spec)
        self.roles: Mapping[str, Role] = reference_roles([POLICY, REFERENCE] if own_reference else [POLICY])

    def rollout(self, engine: Any, batch: ComparedBatch) -> ComparedBatch:
        return batch

    def minibatches(self, batch: ComparedBatch) -> Sequence[ComparedBatch]:
        return (batch,)

    def counts(self, batch: ComparedBatch) -> dict[str, int]:
        nll = {"nll": int(batch.texts.mask[batch.chosen].sum())} if self.settings.nll else {}
        return {"dpo": len(batch.chosen), **nll, **self.auxiliary.counts(batch.texts.num_tokens)}

    def loss(self, models: Models, batch: ComparedBatch) -> tuple[dict[str, Term], dict[str, Term]]:
        settings, texts = self.settings, batch.texts
        with reference_in(models) as reference:
            before = summed_log_probs(reference, read_texts(reference, texts).output, texts)
        output, valid = read_texts(models[POLICY], texts)
        after = summed_log_probs(models[POLICY], output, texts)
        ratios, tokens = after - before, texts.mask.sum(1)
        chosen, rejected = ratios[batch.chosen], ratios[batch.rejected]
        if settings.loss == "ipo":
            each = ratios / tokens.clamp(min=1)
            losses = ipo_losses(each[batch.chosen], each[batch.rejected], settings.beta)
        else:
            losses = dpo_losses(chosen, rejected, settings.beta, settings.label_smoothing)
        pairs = float(len(chosen))
        terms = {"dpo": Term(losses.sum(), pairs)}
        if settings.nll:
            terms["nll"] = Term(-after[batch.chosen].sum(), tokens[batch.chosen].sum(), settings.nll)
        metrics = {
            "accuracy": Term((chosen > rejected).sum(), pairs),
            "margin": Term(settings.beta * (chosen - rejected).sum(), pairs),
            "chosen_reward": Term(settings.beta * chosen.sum(), pairs),
            "rejected_reward": Term(settings.beta * rejected.sum(), pairs),
            **statistics(POLICY, output.aux),
        }
        return {**terms, **self.auxiliary.terms(output.aux, valid)}, metrics


def summed_log_probs(model: Model, output: Output, texts: TextRows) -> Tensor:
    """log P(answer | prompt) of each row, [R]: the sum over the tokens that its mask scores.

    Only those go through the head, which is a fifth of a small model's operations; a compiler, to which their number would be a new shape
    in every batch, is given all.
    """
    if torch.compiler.is_compiling():
        each = token_log_probs(output.hidden, head_of(model), texts.targets).log_probs
        return (each * texts.mask).sum(1)
    scored = linear_log_probs(output.hidden[texts.mask], head_of(model), texts.targets[texts.mask]).log_probs
    return scored.new_zeros(len(texts.lengths)).index_add(0, texts.mask.nonzero()[:, 0], scored)
