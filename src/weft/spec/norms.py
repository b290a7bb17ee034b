"""Normalisation layers."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from weft.spec.base import Spec


class LayerNorm(Spec):
    """Layer normalisation (Ba et al. 2016)."""

    type: Literal["layer"] = "layer"
    eps: PositiveFloat = 1e-5
    bias: bool = True

    def num_params(self, dim: int) -> int:
        return dim * (2 if self.bias else 1)


class RMSNorm(Spec):
    """Root mean square normalisation (Zhang and Sennrich 2019).

    unit_offset   Gemma's form: the stored weight w scales by 1 + w, in float32, and starts at zero.
    """

    type: Literal["rms"] = "rms"
    eps: PositiveFloat = 1e-5
    unit_offset: bool = False

    def num_params(self, dim: int) -> int:
        return dim


Norm = Annotated[LayerNorm | RMSNorm, Field(discriminator="type")]
