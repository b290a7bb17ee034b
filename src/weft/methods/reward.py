"""Reward models: compared answers, and a head with one output."""

from weft.methods.method import Place, Setup
from weft.methods.preferences import compared_batches
from weft.methods.records import encoder_of
from weft.methods.score import train_score
from weft.nn import Model
from weft.objectives.reward import Reward
from weft.objectives.settings import RewardSettings
from weft.train.job import BatchSource
from weft.train.plan import Plan


class RewardMethod:
    def check(self, plan: Plan) -> None:
        encoder_of(plan)

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        return compared_batches(plan, place, grouped=True)

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        return train_score(policy, 1, plan.recipe.seed)

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = plan.recipe.objective
        assert isinstance(settings, RewardSettings)
        return Setup(Reward(settings, policy.spec))
