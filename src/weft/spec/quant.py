"""How a model's matrices are stored in fewer bits: a rewrite of its spec that changes nothing else about it."""

from typing import Literal

from weft.spec.base import Spec

QuantType = Literal["int8", "int4", "nf4"]
GROUP = 32


class Quant(Spec):
    """Weights in groups of 32 along the input, each group with a scale (and a minimum) in float16; biases and norms stay as they are.

    type     int8: 8-bit codes around zero. int4: 4-bit codes. nf4: 4-bit codes for the 16 levels of a normal distribution (Dettmers et
             al. 2023, appendix E).
    minimum  int4 only: codes count from the group's minimum instead of around zero.
    table    the token table, and the head that reads it or a head of its own, at 8 bits; "float" leaves them.
    """

    type: QuantType
    minimum: bool = False
    table: Literal["int8", "float"] = "int8"

    def bits(self) -> float:
        """Stored bits a weight, scales included."""
        return (8 if self.type == "int8" else 4) + 16 * (1 + self.minimum) / GROUP
