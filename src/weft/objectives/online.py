"""What all objectives share that learn from the policy's own answers: writing them, judging them, and looking at held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.data.answers import AnswerBatch, Answered
from weft.data.collate import TextRows
from weft.data.prompts import HELD_OUT, PromptBatch
from weft.errors import UserError
from weft.nn import Model
from weft.nn.model import Output
from weft.objectives.auxiliary import Auxiliary
from weft.objectives.head import head_of
from weft.objectives.log_probs import LogProbs, linear_log_probs
from weft.objectives.reference import reference_in
from weft.objectives.rows import last_scores, read_texts
from weft.objectives.settings import OnlineSettings
from weft.rewards import Answer, open_judge
from weft.spec import ModelSpec
from weft.train.objective import POLICY, Term
from weft.train.rollout import Rollouts, Sampled
from weft.train.watched import DIVERGENCE, MEAN_REWARD, Watched

REWARD = "reward"  # the role of a reward model
# Answers in a row, none of which ended, that are no accident: from the beginning of a run, and where some have ended before.
FIRST_UNFINISHED, UNFINISHED = 8, 32

Terms = dict[str, Term]


class Online:
    """The part of an online objective that does not depend on what is minimised.

    `answers` writes and judges; `measure` does the same for held-out prompts and makes their mean reward the loss, with its sign turned.
    Metrics over answers: `reward`, and where there are several judges `reward_` with the name of each (`reward_model` for the reward
    model); `finished`, the share that the policy ended; `length` in tokens.
    Its state is how many answers in a row, over all processes and steps, did not end, and whether one ever did.
    """

    watched: Sequence[Watched] = (MEAN_REWARD, DIVERGENCE)

    def __init__(self, settings: OnlineSettings, spec: ModelSpec | None = None) -> None:
        self.online, self.auxiliary = settings, Auxiliary(spec)
        self.judge = open_judge(settings.rewards)
        self.unfinished, self.ended = 0, False

    def state(self) -> dict[str, Any]:
        return {"unfinished": self.unfinished, "ended": self.ended}

    def load_state(self, state: Mapping[str, Any]) -> None:
        # Checkpoints of earlier versions do not say it: the count begins anew.
        self.unfinished, self.ended = int(state.get("unfinished", 0)), bool(state.get("ended", False))

    def answers(self, engine: Rollouts, batch: PromptBatch, samples: int) -> AnswerBatch:
        """`samples` answers to each prompt, side by side, with columns `reward`, `finished`, `length` and what the reward is made of.

        Raises UserError where not one of many answers in a row ends.
        """
        prompts = [example.ids for example in batch.examples]
        written = engine.sample(prompts, batch.seeds, samples)
        self._check_ends(engine, batch, written)
        texts, judged = [], []
        for example, group in zip(batch.examples, written, strict=True):
            for each in group:
                texts.append(Answered(example.ids, each.ids))
                judged.append(self.judge.numbers(Answer(example.prompt, each.text, each.finished, example.facts, example.origin)))
        finished = torch.tensor([float(each.finished) for group in written for each in group])
        length = torch.tensor([float(len(each.ids)) for group in written for each in group])
        rows = AnswerBatch(TextRows.lay(texts), text=batch.text, seed=batch.seeds[0] if batch.seeds else 0)
        parts = {name: torch.tensor([numbers[name] for numbers in judged]) for name in self.judge.parts}
        reward = torch.tensor([self.judge.total(numbers) for numbers in judged])
        if self.online.reward is not None:
            parts["model"] = self._scores(engine, rows)
            reward = reward + parts["model"]
        if self.online.unfinished == "penalise":
            reward = reward - self.online.penalty * (1 - finished)
        if self.online.unfinished == "mask":
            rows = replace(rows, texts=replace(rows.texts, mask=rows.texts.mask & finished.bool()[:, None]))
        named = {f"reward_{Path(name).name}": value for name, value in parts.items()} if len(parts) > 1 else {}
        return replace(rows, columns={"reward": reward, "finished": finished, "length": length, **named})

    def _check_ends(self, engine: Rollouts, batch: PromptBatch, written: Sequence[Sequence[Sampled]]) -> None:
        if self.online.unfinished == "keep":
            return
        finished = [each.finished for group in written for each in group]
        ended, count = engine.world.sum(torch.tensor([sum(finished), len(finished)])).tolist()
        found, which = 0 if ended else count, f"{count} answers to held-out prompts"
        if batch.step != HELD_OUT:
            self.unfinished = found = 0 if ended else self.unfinished + count
            self.ended = self.ended or ended > 0
            step = batch.step + 1
            which = f"{count} answers of step {step}" if found == count else f"last {found} answers up to step {step}"
        if found < (UNFINISHED if self.ended else FIRST_UNFINISHED):
            return
        raise UserError(
            f"not one of the {which} ended within {engine.sampling.max_tokens} tokens, so nothing tells them apart; raise "
            "objective.max_tokens, fine-tune the model first so that it ends its answers, or set objective.unfinished to keep."
        )

    def _scores(self, engine: Rollouts, rows: AnswerBatch) -> Tensor:
        """What the reward model says of each text at its last token, [R] float32."""
        model = engine.models[REWARD]

        def compute(start: int, stop: int) -> dict[str, Tensor]:
            texts = rows.texts.cut(start, stop, keep_width=False).to(engine.device)
            return {"score": last_scores(model, read_texts(model, texts).output.hidden, texts.lengths)[:, 0].float()}

        scores = engine.passes(rows.num_rows, compute)["score"]
        if not bool(scores.isfinite().all()):
            raise UserError(f"the reward model {self.online.reward} gave a reward that is not a finite number; its weights may be damaged.")
        return scores

    def look(self, engine: Rollouts, rows: AnswerBatch, names: Sequence[str]) -> AnswerBatch:
        """The same rows with tables that models have to be asked for: `old`, log-probabilities under the policy as it is; `reference`,
        under the reference; `value`, what the critic foretells. Each is 0 where there is no answer."""

        def compute(start: int, stop: int) -> dict[str, Tensor]:
            texts = rows.texts.cut(start, stop, keep_width=False).to(engine.device)
            found: dict[str, Tensor] = {}
            if "old" in names:
                policy = engine.models[POLICY]
                found["old"] = laid(
                    answer_log_probs(policy, read_texts(policy, texts).output, texts, self.online.temperature).log_probs, texts
                )
            if "reference" in names:
                with reference_in(engine.models) as model:
                    each = answer_log_probs(model, read_texts(model, texts).output, texts, self.online.temperature)
                found["reference"] = laid(each.log_probs, texts)
            if "value" in names:
                critic = engine.models["critic"]
                found["value"] = laid(answer_values(critic, read_texts(critic, texts).output, texts), texts)
            return found

        found = engine.passes(rows.num_rows, compute)
        width = rows.texts.tokens.shape[1]
        tables = {name: torch.nn.functional.pad(value, (0, width - value.shape[1])) for name, value in found.items()}
        return replace(rows, tables={**rows.tables, **tables})

    def measure(self, engine: Rollouts, batch: PromptBatch) -> tuple[Terms, Terms]:
        """One answer to each held-out prompt, drawn with the same luck at every look; the loss is the mean reward with its sign turned."""
        rows = self.answers(engine, batch, 1)
        metrics = row_metrics(rows)
        return {"unrewarded": Term(-metrics["reward"].sum, float(rows.num_rows))}, metrics


def row_metrics(rows: AnswerBatch, names: Sequence[str] = ()) -> Terms:
    """The columns that are worth showing, as means over answers; `names` adds further ones."""
    shown = [name for name in rows.columns if name in ("reward", "finished", "length", *names) or name.startswith("reward_")]
    return {name: Term(rows.columns[name].sum(), float(rows.num_rows)) for name in shown}


def answer_kl(away: Tensor, texts: TextRows) -> Term:
    """Nats an answer from the reference, given their sum: over the answers that are learned from."""
    return Term(away, texts.mask.any(1).sum())


def answer_log_probs(model: Model, output: Output, texts: TextRows, temperature: float = 1.0, entropy: bool = False) -> LogProbs:
    """Log-probabilities [n] of the tokens of answers, row after row, at the places that `texts.mask` marks."""
    return linear_log_probs(output.hidden[texts.mask], head_of(model), texts.targets[texts.mask], temperature, entropy)


def answer_values(critic: Model, output: Output, texts: TextRows) -> Tensor:
    """What a critic foretells [n] at the same places."""
    assert critic.score is not None, "the critic has no score head"
    values: Tensor = critic.score(output.hidden[texts.mask])[:, 0]
    return values


def laid(values: Tensor, texts: TextRows) -> Tensor:
    """Values [n] of marked places as a table [R, T] with zeros elsewhere."""
    return torch.zeros(texts.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(texts.mask, values)


def spread(column: Tensor, texts: TextRows) -> Tensor:
    """A number a row [R] at each of its marked places, [n]."""
    return column[:, None].expand(texts.mask.shape)[texts.mask]
