"""Direct preference optimisation: compared answers, and the reference that the policy stays near."""

from weft.errors import UserError
from weft.methods.frozen import has_fresh_adapter, open_frozen
from weft.methods.method import Place, Setup
from weft.methods.preferences import compared_batches
from weft.methods.records import encoder_of
from weft.nn import Model
from weft.nn.dropout import without_dropout
from weft.objectives.dpo import DPO
from weft.objectives.reference import REFERENCE, reference_of
from weft.objectives.settings import DPOSettings
from weft.train.job import BatchSource
from weft.train.plan import Plan


class DPOMethod:
    def check(self, plan: Plan) -> None:
        encoder_of(plan)
        settings = _settings(plan)
        if settings.loss == "ipo" and settings.label_smoothing:
            raise UserError(
                f"objective.label_smoothing is {settings.label_smoothing:g}, but the loss is ipo, which has none; set it to 0, or loss to "
                "sigmoid."
            )

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        assert plan.tokenizer is not None
        left_out = plan.tokenizer.special_ids if _settings(plan).mask_format else frozenset()
        return compared_batches(plan, place, grouped=False, left_out=left_out)

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        return without_dropout(policy)

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = _settings(plan)
        other = None if settings.reference is None else open_frozen(settings.reference, "objective.reference", plan, place, policy.dtype)
        models = reference_of(policy, other, has_fresh_adapter(plan))
        return Setup(DPO(settings, policy.spec, own_reference=REFERENCE in models), models)


def _settings(plan: Plan) -> DPOSettings:
    settings = plan.recipe.objective
    assert isinstance(settings, DPOSettings)
    return settings
