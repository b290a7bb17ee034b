"""Attention whose weights may be exactly zero."""

from typing import Literal

from pydantic import FiniteFloat, PositiveFloat, PositiveInt, model_validator

from weft.spec.base import StateSpec
from weft.spec.mixers import Attention, _Heads
from weft.spec.norms import Norm
from weft.spec.patterns import Pattern
from weft.spec.positions import Rope


class EntmaxAttention(_Heads):
    """Attention with alpha-entmax in place of softmax (Correia et al. 2019, equation 3): keys of low score get no weight at all.

    alpha        above 1. Near 1 it is softmax, 1.5 is exact by sorting, 2 is sparsemax; the larger, the sparser.
    learn_alpha  every head learns its own, 1 + sigmoid(a) (section 3.2), and `alpha` is where they begin: between 1 and 2.
    The other fields are those of `attention`.
    """

    type: Literal["entmax_attention"] = "entmax_attention"
    alpha: FiniteFloat = 1.5
    learn_alpha: bool = False
    window: PositiveInt | None = None
    pattern: Pattern | None = None
    causal: bool = True
    rope: Rope | None = None
    qk_norm: Norm | None = None
    scale: PositiveFloat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "EntmaxAttention":
        if not self.alpha > 1:
            raise ValueError(
                f"alpha is {self.alpha}; entmax takes numbers above 1: 1.5 is usual, and 1 would be softmax, which is type: attention."
            )
        if self.learn_alpha and not self.alpha < 2:
            raise ValueError(
                f"alpha is {self.alpha} with learn_alpha; a learned alpha begins between 1 and 2: give less, or learn_alpha: false."
            )
        self.softmax()  # says what is wrong with the fields they share
        return self

    def softmax(self) -> Attention:
        """The same layer with softmax: what it would count, compute and remember, and how queries and keys are made."""
        shared = {name: getattr(self, name) for name in EntmaxAttention.model_fields if name not in ("type", "alpha", "learn_alpha")}
        return Attention(**shared)

    def num_params(self, dim: int) -> int:
        return self.softmax().num_params(dim) + self.learn_alpha * self.heads

    def flops(self, dim: int, length: int) -> int:
        return self.softmax().flops(dim, length)

    def state(self, dim: int) -> StateSpec | None:
        return self.softmax().state(dim)
