"""Proximal policy optimisation from human feedback, as InstructGPT has it (Ouyang et al. 2022, appendix C; Ziegler et al. 2019)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from weft.data.answers import AnswerBatch
from weft.data.prompts import PromptBatch
from weft.objectives.advantages import clipped_policy, clipped_value, controlled, gae, whiten
from weft.objectives.auxiliary import statistics
from weft.objectives.cross_entropy import linear_cross_entropy
from weft.objectives.head import head_of
from weft.objectives.next_token import step_of
from weft.objectives.online import Online, Terms, answer_kl, answer_log_probs, answer_values, row_metrics
from weft.objectives.reference import REFERENCE, reference_roles
from weft.objectives.rows import read_texts
from weft.objectives.settings import PPOSettings
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Models, Role, Term
from weft.train.rollout import Rollouts

CRITIC = "critic"


class PPO(Online):
    """Clipped policy and value losses over a rollout, in several epochs of minibatches.

    The reward of a token is -beta log(policy / reference); the last one of an answer also has the reward of the whole. Advantages are
    generalised ones, whitened over the rollout of all processes; returns are advantages plus values, before whitening.

    Terms `policy` and `value` over tokens, and `pretrain` over the tokens of other text (PPO-ptx). Metrics besides `Online`'s: `answer_kl`,
    nats an answer from the reference (log-ratios summed over its tokens), `beta`, `entropy` of the policy in nats a token, `clipped`
    and `value_clipped`, the shares of tokens whose gradient a clip holds back.
    With a target the controller moves beta after each rollout; beta is part of this objective's state.
    """

    def __init__(self, settings: PPOSettings, spec: ModelSpec | None = None, own_reference: bool = True) -> None:
        """own_reference  whether a model of its own is the reference, or the policy without its adapter."""
        super().__init__(settings, spec)
        self.settings, self.beta = settings, settings.beta
        names = [POLICY, REFERENCE] if own_reference else [POLICY]
        self.roles: Mapping[str, Role] = {**reference_roles(names), CRITIC: Role(trained=True, reads=frozenset({"score"}))}
        if settings.reward is not None:
            self.roles = {**self.roles, "reward": Role(trained=False)}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "beta": self.beta}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.beta = float(state["beta"])

    def rollout(self, engine: Rollouts, batch: PromptBatch) -> AnswerBatch:
        settings = self.settings
        rows = self.look(engine, self.answers(engine, batch, settings.samples), ("old", "reference", "value"))
        mask, value = rows.texts.mask, rows.tables["value"]
        away = (rows.tables["old"] - rows.tables["reference"]) * mask
        rewards = token_rewards(rows, self.beta)
        advantages = gae(rewards, value, mask, settings.gamma, settings.lam)
        nats = away.sum(1)
        columns = {**rows.columns, "answer_kl": nats, "beta": torch.full_like(nats, self.beta)}
        tables = {
            "old": rows.tables["old"],
            "value": value,
            "return": (advantages + value) * mask,
            "advantage": whiten(advantages, mask, engine.world),
        }
        if settings.target is not None:
            learned = mask.any(1)
            kl, count = engine.world.sum(torch.stack([nats.double().sum(), learned.sum().double()])).tolist()
            if count:
                self.beta = controlled(self.beta, kl / count, settings.target, settings.gain)
        return replace(rows, columns=columns, tables=tables)

    def minibatches(self, batch: AnswerBatch) -> Sequence[AnswerBatch]:
        return batch.updates(self.settings.epochs, self.settings.minibatches)

    def counts(self, batch: AnswerBatch) -> dict[str, int]:
        tokens = batch.texts.num_targets
        pretrain = {} if self.settings.pretrain is None else {"pretrain": 0 if batch.text is None else batch.text.num_targets}
        return {"policy": tokens, "value": tokens, **pretrain, **self.auxiliary.counts(batch.texts.num_tokens)}

    def loss(self, models: Models, batch: AnswerBatch) -> tuple[Terms, Terms]:
        settings, texts = self.settings, batch.texts
        output, valid = read_texts(models[POLICY], texts)
        found = answer_log_probs(models[POLICY], output, texts, settings.temperature, entropy=True)
        assert found.entropy is not None
        mine = {name: table[texts.mask] for name, table in batch.tables.items()}
        policy = clipped_policy(found.log_probs, mine["old"], mine["advantage"], settings.clip, settings.clip)
        foretold = answer_values(models[CRITIC], read_texts(models[CRITIC], texts).output, texts)
        value = clipped_value(foretold, mine["value"], mine["return"], settings.value_clip)
        tokens = texts.mask.sum()
        terms = {"policy": Term(policy.losses.sum(), tokens), "value": Term(value.losses.sum(), tokens, settings.value_weight)}
        metrics = {
            **row_metrics(batch, ["beta"]),
            "answer_kl": answer_kl(batch.columns["answer_kl"].sum(), texts),
            "entropy": Term(found.entropy.sum(), tokens),
            "clipped": Term(policy.clipped.sum(), tokens),
            "value_clipped": Term(value.clipped.sum(), tokens),
        }
        terms |= {**self._pretrain(models, batch), **self.auxiliary.terms(output.aux, valid)}
        return terms, {**metrics, **statistics(POLICY, output.aux)}

    def _pretrain(self, models: Models, batch: AnswerBatch) -> Terms:
        """Next tokens of other text, L_ptx = -gamma log pi(x) (Ouyang et al. 2022, equation 2)."""
        if self.settings.pretrain is None:
            return {}
        weight, text = self.settings.pretrain.weight, batch.text
        if text is None:
            return {"pretrain": Term(torch.zeros((), device=batch.texts.tokens.device), 0.0, weight)}
        hidden = models[POLICY](text.tokens, step_of(text)).hidden.flatten(0, 1)
        mask = text.loss_mask.flatten()
        sums = linear_cross_entropy(hidden, head_of(models[POLICY]), text.targets.flatten().clamp(min=0), mask)
        return {"pretrain": Term(sums.loss, mask.sum(), weight)}


def token_rewards(rows: AnswerBatch, beta: float) -> torch.Tensor:
    """[R, T]: -beta (log policy - log reference) at every token of an answer, and at its last one the answer's reward too (Ouyang et al.
    2022, equation 2; Ziegler et al. 2019, equation 2)."""
    mask, lengths = rows.texts.mask, rows.texts.lengths
    rewards = -beta * (rows.tables["old"] - rows.tables["reference"]) * mask
    places = torch.arange(mask.shape[1], device=mask.device)
    last = mask & (places == lengths[:, None] - 2)
    return rewards + last * rows.columns["reward"][:, None]
