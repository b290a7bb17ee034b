"""Rejection sampling: the best of several answers, learned like any other text (Llama 2, Touvron et al. 2023, section 3.2.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from weft.data.answers import AnswerBatch
from weft.data.prompts import PromptBatch
from weft.objectives.auxiliary import statistics
from weft.objectives.cross_entropy import linear_cross_entropy
from weft.objectives.head import head_of
from weft.objectives.online import Online, Terms, row_metrics
from weft.objectives.rows import read_texts
from weft.objectives.settings import RejectionSettings
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Models, Role, Term
from weft.train.rollout import Rollouts
from weft.train.watched import MEAN_REWARD, Watched


class Rejection(Online):
    """Next tokens of the answers that were kept: `keep` of each prompt's `samples`, those with the highest reward (of equals the first).

    Term `next_token`. Metrics besides `Online`'s, of which `reward` is the mean of all answers and the others are of those kept:
    `kept_reward`.
    """

    watched = (MEAN_REWARD, Watched("kept_reward", label="reward of those kept"))

    def __init__(self, settings: RejectionSettings, spec: ModelSpec | None = None) -> None:
        super().__init__(settings, spec)
        self.settings = settings
        self.roles: Mapping[str, Role] = {POLICY: Role(trained=True)}
        if settings.reward is not None:
            self.roles = {**self.roles, "reward": Role(trained=False)}

    def rollout(self, engine: Rollouts, batch: PromptBatch) -> AnswerBatch:
        rows = self.answers(engine, batch, self.settings.samples)
        rewards = rows.columns["reward"]
        groups = rewards.view(-1, self.settings.samples)
        best = torch.argsort(groups, dim=1, descending=True, stable=True)[:, : self.settings.keep]
        first = torch.arange(len(groups))[:, None] * self.settings.samples
        columns = {**rows.columns, "reward": groups.mean(1).repeat_interleave(self.settings.samples), "kept_reward": rewards}
        return replace(rows, columns=columns).pick((first + best).flatten())

    def minibatches(self, batch: AnswerBatch) -> Sequence[AnswerBatch]:
        return batch.updates(self.settings.epochs, 1)

    def counts(self, batch: AnswerBatch) -> dict[str, int]:
        return {"next_token": batch.texts.num_targets, **self.auxiliary.counts(batch.texts.num_tokens)}

    def loss(self, models: Models, batch: AnswerBatch) -> tuple[Terms, Terms]:
        texts = batch.texts
        output, valid = read_texts(models[POLICY], texts)
        mask = texts.mask.flatten()
        sums = linear_cross_entropy(output.hidden.flatten(0, 1), head_of(models[POLICY]), texts.targets.flatten(), mask)
        terms = {"next_token": Term(sums.loss, mask.sum()), **self.auxiliary.terms(output.aux, valid)}
        return terms, {**row_metrics(batch, ["kept_reward"]), **statistics(POLICY, output.aux)}
