"""What a recipe says under `objective`: which loss, and its constants. Importable without torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag

from weft.spec.base import Spec

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class NextTokenSettings(Spec):
    """Predict each next token: GPT-1's L1 (Radford et al. 2018, equation 1).

    label_smoothing  share of each target spread evenly over the vocabulary (Szegedy et al. 2016).
    z_loss           factor of the squared log-partition function, which keeps logits from drifting (Chowdhery et al. 2022); 1e-4 is usual.
    mtp              weight of multi-token prediction's loss, for a model with modules for it (DeepSeek-V3's lambda); None is 0.3, and at 0
                     they are not trained.
    """

    type: Literal["next_token"] = "next_token"
    label_smoothing: Share = 0.0
    z_loss: NonNegativeFloat = 0.0
    mtp: NonNegativeFloat | None = None


class SFTSettings(Spec):
    """Supervised fine-tuning: next tokens of what the assistant says (InstructGPT's first step, Ouyang et al. 2022).

    label_smoothing  as for next_token.
    neftune          noise added to embeddings in training, uniform in +-neftune / sqrt(T D) (Jain et al. 2023); 5 is usual, 0 adds none.
    """

    type: Literal["sft"] = "sft"
    label_smoothing: Share = 0.0
    neftune: NonNegativeFloat = 0.0


class ClassifySettings(Spec):
    """A class from the last token's hidden state, GPT-1's recipe: L3 = L2 + lm * L1 (Radford et al. 2018, equations 3 to 5).

    lm  weight of the language model's loss on the same texts; 0 is L2 alone.
    """

    type: Literal["classify"] = "classify"
    lm: NonNegativeFloat = 0.5


class RewardSettings(Spec):
    """A number a text, larger for the chosen than for the rejected one (Bradley and Terry 1952; InstructGPT, equation 1).

    centre  weight of the squared sum of a pair's rewards, which keeps them near zero (Eisenstein et al. 2023).
    """

    type: Literal["reward"] = "reward"
    centre: NonNegativeFloat = 0.0


class DPOSettings(Spec):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    beta             how dear it is to leave the reference.
    loss             sigmoid, or ipo (Azar et al. 2023, equation 17).
    label_smoothing  share of pairs that are taken to be labelled the wrong way round (cDPO); sigmoid only.
    nll              weight of the chosen answers' negative log-likelihood (Llama 3, section 4.1.4, has 0.2).
    mask_format      leave a template's own tokens out of the log-probabilities (the same section).
    reference        the model to stay near; None is the model that training began with.
    """

    type: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    nll: NonNegativeFloat = 0.0
    mask_format: bool = False
    reference: str | None = None


class DistillSettings(Spec):
    """A teacher's distribution over next tokens (Hinton et al. 2015).

    teacher      name or folder of a model of the same tokenizer.
    temperature  of both distributions.
    alpha        weight of the teacher's loss; 1 - alpha is left for the data's tokens.
    divergence   forward KL, reverse KL, or jsd between the two, with `mixture` as the teacher's share (Agarwal et al. 2024).
    on_policy    share of batches whose texts the student writes itself (Agarwal et al. 2024); 0 takes the data's.
    """

    type: Literal["distill"] = "distill"
    teacher: str
    temperature: PositiveFloat = 1.0
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    mixture: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    on_policy: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    max_tokens: PositiveInt = 64



def _named(value: Any) -> Any:
    """`objective: dpo` for `objective: {type: dpo}`, and next_token where no type is given."""
    if isinstance(value, str):
        return {"type": value}
    return {"type": "next_token", **value} if isinstance(value, dict) else value


def _kind(value: Any) -> str | None:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


ObjectiveSettings = Annotated[
    Annotated[NextTokenSettings, Tag("next_token")]
    | Annotated[SFTSettings, Tag("sft")]
    | Annotated[ClassifySettings, Tag("classify")]
    | Annotated[RewardSettings, Tag("reward")]
    | Annotated[DPOSettings, Tag("dpo")]
    | Annotated[DistillSettings, Tag("distill")],
    Discriminator(_kind),
    BeforeValidator(_named),
]
