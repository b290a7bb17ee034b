"""What a recipe says under `objective`. Importable without torch."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from weft.spec.base import Spec


class NextTokenSettings(Spec):
    """Predict each next token: GPT-1's L1 (Radford et al. 2018, equation 1).

    label_smoothing  share of each target spread evenly over the vocabulary (Szegedy et al. 2016).
    z_loss           factor of the squared log-partition function, which keeps logits from drifting (Chowdhery et al. 2022); 1e-4 is usual.
    mtp              weight of multi-token prediction's loss, for a model with modules for it (DeepSeek-V3's lambda); None is 0.3, and at 0
                     they are not trained.
    """

    type: Literal["next_token"] = "next_token"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    z_loss: NonNegativeFloat = 0.0
    mtp: NonNegativeFloat | None = None


ObjectiveSettings = NextTokenSettings
