"""On-policy distillation: the teacher looks at what the student itself writes (generalised knowledge distillation, Agarwal et al. 2024)."""

from typing import Any

from weft.data.answers import Answered
from weft.data.lessons import given_texts, is_drawn, rows_of
from weft.data.packing import PackedBatch
from weft.objectives.distill import Distill
from weft.objectives.settings import DistillSettings
from weft.spec import ModelSpec


class OnPolicyDistill(Distill):
    """Algorithm 1: in a share of the steps the texts are the student's answers, in the others the data's. No gradient goes through the
    drawing of answers. A student that is only shown good texts never learns how to go on after a mistake of its own.
    """

    def __init__(self, settings: DistillSettings, spec: ModelSpec | None = None) -> None:
        super().__init__(settings, spec)
        self.share = settings.on_policy

    def rollout(self, engine: Any, batch: Any) -> PackedBatch:
        """engine is a `Rollouts`; batch is a `PromptBatch` of lessons."""
        if not is_drawn(batch, self.share):
            return given_texts(batch)
        prompts = [example.ids for example in batch.examples]
        written = engine.sample(prompts, batch.seeds, 1)
        return rows_of([Answered(prompt, answers[0].ids) for prompt, answers in zip(prompts, written, strict=True)])
