"""How a model's matrices are stored in fewer bits: a rewrite of its spec that changes nothing else about it."""

from typing import Any, Literal

from pydantic import model_validator

from weft.spec.base import Spec

QuantType = Literal["int8", "int4", "nf4"]
GROUP = 32
DOUBLE_GROUP, SCALES = 64, 256  # QLoRA's block of weights, and its block of scales


class Quant(Spec):
    """Weights in groups of 32 along the input, each group with a scale (and a minimum) in float16; biases and norms stay as they are.

    type     int8: 8-bit codes around zero. int4: 4-bit codes. nf4: 4-bit codes for the 16 levels of a normal distribution (Dettmers et
             al. 2023, appendix E).
    minimum  int4 only: codes count from the group's minimum instead of around zero.
    double   nf4 only: groups of 64 whose scales are codes of 8 bits themselves, in blocks of 256 around the mean of a matrix's scales
             (double quantisation, section 3 there): what QLoRA trains upon.
    table    the token table, and the head that reads it or a head of its own, at 8 bits; "float" leaves them.
    """

    type: QuantType
    minimum: bool = False
    double: bool = False
    table: Literal["int8", "float"] = "int8"

    @model_validator(mode="after")
    def _consistent(self) -> "Quant":
        for key, given, owner in (("minimum", self.minimum, "int4"), ("double", self.double, "nf4")):
            if given and self.type != owner:
                raise ValueError(f"{key} is true but type is {self.type}; only {owner} has that form: drop {key}, or set type to {owner}.")
        return self

    @property
    def group(self) -> int:
        """Weights of a row that share a scale."""
        return DOUBLE_GROUP if self.double else GROUP

    def bits(self) -> float:
        """Stored bits a weight, scales included."""
        if self.double:
            return 4 + (8 + 32 / SCALES) / DOUBLE_GROUP
        return (8 if self.type == "int8" else 4) + 16 * (1 + self.minimum) / GROUP


# What a bare name stands for where training or a verb asks for a format: the best of its form.
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"type": "int8"},
    "int4": {"type": "int4", "minimum": True},
    "nf4": {"type": "nf4", "double": True},
}
