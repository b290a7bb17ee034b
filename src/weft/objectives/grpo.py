"""Group-relative policy optimisation: answers compared with others to the same prompt, without a critic (Shao et al. 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weft.data.answers import AnswerBatch
from weft.data.collate import TextRows
from weft.data.prompts import PromptBatch
from weft.objectives.advantages import clipped_policy, group_advantages, k3
from weft.objectives.auxiliary import statistics
from weft.objectives.online import Online, Terms, answer_kl, answer_log_probs, row_metrics, spread
from weft.objectives.reference import REFERENCE, reference_roles
from weft.objectives.rows import read_texts
from weft.objectives.settings import GRPOSettings
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Models, Role, Term
from weft.train.rollout import Rollouts


class GRPO(Online):
    """The clipped ratio times a group's advantages, and beta times k3 to the reference (equations 3 and 4).

    Terms `policy`, and `kl` of weight beta, both averaged as `settings.loss` says. Metrics besides `Online`'s: `answer_kl`, nats an answer
    from the reference (k3 summed over its tokens), where there is one; `entropy` of the policy in nats a token; `clipped`, the share of
    tokens whose gradient the clip holds back; `flat`, the share of answers whose whole group has one reward, which teaches nothing.
    In the first update of a rollout the ratio is 1 by definition, so that with one update no old log-probabilities are computed.
    """

    def __init__(self, settings: GRPOSettings, spec: ModelSpec | None = None, own_reference: bool = True) -> None:
        """own_reference  whether a model of its own is the reference, or the policy without its adapter."""
        super().__init__(settings, spec)
        self.settings = settings
        own = own_reference and settings.beta > 0
        self.roles: Mapping[str, Role] = reference_roles([POLICY, REFERENCE] if own else [POLICY])
        if settings.reward is not None:
            self.roles = {**self.roles, "reward": Role(trained=False)}

    def rollout(self, engine: Rollouts, batch: PromptBatch) -> AnswerBatch:
        settings = self.settings
        rows = self.answers(engine, batch, settings.samples)
        rewards = rows.columns["reward"]
        groups = rewards.view(-1, settings.samples)
        flat = (groups.amax(1) == groups.amin(1)).float().repeat_interleave(settings.samples)
        advantages = group_advantages(rewards, settings.samples, settings.scale)
        rows = replace(rows, columns={**rows.columns, "advantage": advantages, "flat": flat})
        several = settings.epochs * settings.minibatches > 1
        names = [name for name, wanted in (("old", several), ("reference", settings.beta > 0)) if wanted]
        return self.look(engine, rows, names) if names else rows

    def minibatches(self, batch: AnswerBatch) -> Sequence[AnswerBatch]:
        return batch.updates(self.settings.epochs, self.settings.minibatches)

    def counts(self, batch: AnswerBatch) -> dict[str, int]:
        count = batch.texts.num_targets if self.settings.loss == "dapo" else batch.num_rows
        kl = {"kl": count} if self.settings.beta else {}
        return {"policy": count, **kl, **self.auxiliary.counts(batch.texts.num_tokens)}

    def loss(self, models: Models, batch: AnswerBatch) -> tuple[Terms, Terms]:
        settings, texts = self.settings, batch.texts
        output, valid = read_texts(models[POLICY], texts)
        found = answer_log_probs(models[POLICY], output, texts, settings.temperature, entropy=True)
        assert found.entropy is not None
        old = batch.tables["old"][texts.mask] if "old" in batch.tables else found.log_probs.detach()
        high = settings.clip if settings.clip_high is None else settings.clip_high
        policy = clipped_policy(found.log_probs, old, spread(batch.columns["advantage"], texts), settings.clip, high)
        weights, tokens, answers = self._weights(texts), texts.mask.sum(), float(batch.num_rows)
        count = tokens if settings.loss == "dapo" else answers
        terms = {"policy": Term((policy.losses * weights).sum(), count)}
        metrics = {
            **row_metrics(batch, ["flat"]),
            "entropy": Term(found.entropy.sum(), tokens),
            "clipped": Term(policy.clipped.sum(), tokens),
            **statistics(POLICY, output.aux),
        }
        if settings.beta:
            away = k3(found.log_probs, batch.tables["reference"][texts.mask])
            if settings.unbiased_kl:
                away = away * (found.log_probs - old).exp()
            terms["kl"] = Term((away * weights).sum(), count, settings.beta)
            metrics["answer_kl"] = answer_kl(away.detach().sum(), texts)
        return {**terms, **self.auxiliary.terms(output.aux, valid)}, metrics

    def _weights(self, texts: TextRows) -> Tensor:
        """What each answer token [n] counts in the sum."""
        if self.settings.loss == "dapo":
            return torch.ones((), device=texts.mask.device)
        if self.settings.loss == "dr_grpo":
            return torch.full((), 1 / self.settings.max_tokens, device=texts.mask.device)
        return spread(1 / texts.mask.sum(1).clamp(min=1), texts)
