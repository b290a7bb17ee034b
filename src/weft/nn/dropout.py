"""Dropout taken out of a model that has been built."""

from torch import nn

from weft.nn.model import Model


def without_dropout(model: Model) -> Model:
    """Let a model compute in training what it computes at rest, in place; its spec stays, and so does what an adapter was asked to drop.

    Where a loss compares log-probabilities with ones that were taken at rest (of a reference, or before an update), what dropout changes
    would be taken for a change of the policy.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            vars(module)["dropout"] = 0.0
    return model
