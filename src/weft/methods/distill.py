"""Distillation: text or records, and a teacher that reads them too."""

from weft.errors import UserError
from weft.methods.frozen import check_frozen, open_frozen
from weft.methods.method import Place, Setup
from weft.methods.next_token import NextTokenMethod
from weft.methods.sft import check_packing, reads_records, record_batches
from weft.nn import Model
from weft.objectives.distill import TEACHER, Distill
from weft.objectives.settings import DistillSettings
from weft.train.job import BatchSource
from weft.train.plan import Plan


class DistillMethod:
    def check(self, plan: Plan) -> None:
        settings = _settings(plan)
        checkpoint = check_frozen(settings.teacher, "objective.teacher", plan)
        if plan.tokenizer is None:
            raise UserError("there is no tokenizer to compare the teacher's with; give tokenizer=PATH.")
        if any(block.cross is not None for block in checkpoint.spec.blocks()):
            raise UserError(f"objective.teacher is {settings.teacher}, which has cross-attention; give a decoder-only model.")
        if reads_records(plan):
            check_packing(plan)

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        return record_batches(plan, place) if reads_records(plan) else NextTokenMethod().batches(plan, place)

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        return policy

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = _settings(plan)
        teacher = open_frozen(settings.teacher, "objective.teacher", plan, place)
        return Setup(Distill(settings, policy.spec), {TEACHER: teacher})


def _settings(plan: Plan) -> DistillSettings:
    settings = plan.recipe.objective
    assert isinstance(settings, DistillSettings)
    return settings
