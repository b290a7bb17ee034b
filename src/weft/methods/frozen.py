"""Models that a run reads and does not train: teachers, references."""

import torch

from weft.errors import UserError
from weft.methods.method import Place
from weft.nn import Model
from weft.spec import Learned
from weft.tokenizer import load_tokenizer
from weft.tokenizer.compare import same_ids
from weft.train.plan import Plan
from weft.weights.load import Checkpoint, load_weights, open_checkpoint


def check_frozen(source: str, key: str, plan: Plan) -> Checkpoint:
    """A model that has to read what the policy reads, its weights not loaded; `key` names it in the recipe.

    Raises UserError where it cannot be had, has another tokenizer, or fewer positions than a row has tokens.
    """
    checkpoint = open_checkpoint(source)
    if plan.tokenizer is not None and not same_ids(plan.tokenizer, load_tokenizer(checkpoint.path)):
        raise UserError(f"{key} is {source}, whose tokenizer is another one than the model's; give a model of the same tokenizer.")
    spec = checkpoint.spec
    if isinstance(spec.position, Learned) and plan.length > spec.position.length:
        raise UserError(
            f"{key} is {source}, which has {spec.position.length} positions, but rows are {plan.length} tokens long; lower batch.length."
        )
    return checkpoint


def open_frozen(source: str, key: str, plan: Plan, place: Place, dtype: torch.dtype | None = None) -> Model:
    """The same with its weights.

    dtype  of the weights; None takes that of the run's products where these are bfloat16, which takes half the memory.
    A score head stays in full precision, or rewards that differ by little would be rounded together.
    """
    checkpoint = check_frozen(source, key, plan)
    narrow = place.products if place.products == torch.bfloat16 else place.dtype
    model = load_weights(checkpoint, place.device, dtype or narrow)
    if model.score is not None:
        model.score.to(place.dtype)
    return model.requires_grad_(False)


def has_fresh_adapter(plan: Plan) -> bool:
    """Whether the policy's adapter, where it has one, is new: without it the policy is what training began with."""
    return plan.checkpoint is None or plan.checkpoint.adapter is None
