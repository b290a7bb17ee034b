"""Drawing initial weights."""

from torch import Tensor, nn


def fill_normal(weight: Tensor, std: float) -> None:
    """Draw from N(0, std^2). On `meta` there is nothing to draw, and torch would import 800 modules (sympy) to find that out."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
