"""Next-token prediction: pretraining, and whatever text a store of tokens has masks for."""

from typing import Any

from weft.data.load import open_batches
from weft.methods.method import Place, Setup
from weft.nn import Model
from weft.objectives.next_token import NextToken
from weft.objectives.settings import NextTokenSettings
from weft.train.job import BatchSource
from weft.train.plan import Plan


class NextTokenMethod:
    def check(self, plan: Plan) -> None:
        pass

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        recipe, world = plan.recipe, place.world
        shape: dict[str, Any] = {"length": plan.length, "batch_size": recipe.batch.rows, "seed": recipe.seed}
        return open_batches(
            plan.data, **shape, rank=world.rank, world=world.size, tokenizer=plan.tokenizer, cache=place.cache, progress=place.progress
        )

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        return policy

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = plan.recipe.objective
        assert isinstance(settings, NextTokenSettings)
        return Setup(NextToken(settings, depth=plan.spec.mtp.depth if plan.spec.mtp else 0, spec=plan.spec))
