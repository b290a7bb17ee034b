"""How a model knows where a token stands: nothing, an addition to the embedding, or a rotation of queries and keys."""

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from weft.spec.base import Spec


class NoPosition(Spec):
    """Nothing is added: recurrences need no positions, and rotary models put them in the mixer."""

    type: Literal["none"] = "none"

    def num_params(self, dim: int) -> int:
        return 0


class Sinusoidal(Spec):
    """Fixed sines and cosines (Vaswani et al. 2017, section 3.5)."""

    type: Literal["sinusoidal"] = "sinusoidal"
    base: PositiveFloat = 10000.0

    def num_params(self, dim: int) -> int:
        return 0


class Learned(Spec):
    """A trained vector a position, as in GPT-1 to GPT-3; the table has `length` rows."""

    type: Literal["learned"] = "learned"
    length: PositiveInt

    def num_params(self, dim: int) -> int:
        return self.length * dim


Position = Annotated[NoPosition | Sinusoidal | Learned, Field(discriminator="type")]


class LinearScaling(Spec):
    """Positions divided by `factor` (position interpolation, Chen et al. 2023)."""

    type: Literal["linear"] = "linear"
    factor: PositiveFloat


class Llama3Scaling(Spec):
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between blended."""

    type: Literal["llama3"] = "llama3"
    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_context: PositiveInt = 8192

    @model_validator(mode="after")
    def _ordered(self) -> "Llama3Scaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor} and low_freq_factor {self.low_freq_factor}; the high one must be larger."
            )
        return self


class YarnScaling(Spec):
    """YaRN (Peng et al. 2023): interpolation by wavelength, and a factor on cosines and sines that sharpens attention.

    attention_factor  of cosines and sines; None takes the paper's 0.1 ln(factor) + 1 (equation 22).
    mscale_all_dim    where given, scores are multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2: DeepSeek-V2's form, which sharpens
                      channels that are not rotated as well (DeepSeek-AI 2024, section 3.1.4).
    """

    type: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_context: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None


Scaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="type")]


class Rope(Spec):
    """Rotary positions (Su et al. 2021), the halves of a head rotated together as in Hugging Face's Llama."""

    base: PositiveFloat = 10000.0
    scaling: Scaling | None = None

    @property
    def score_factor(self) -> float:
        """What scores are multiplied by beside their scale; 1 but for a YaRN with `mscale_all_dim`."""
        yarn = self.scaling
        if not isinstance(yarn, YarnScaling) or yarn.mscale_all_dim is None or yarn.factor <= 1:
            return 1.0
        return (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0) ** 2
