"""What a recipe says under `objective`: which loss, and its constants. Importable without torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag, model_validator

from weft.rewards.registry import REWARDS, check_rewards
from weft.spec.base import Spec
from weft.train.settings import OptimSettings

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

    lm       weight of the language model's loss on the same texts; 0 is L2 alone.
    classes  of a model that is a classifier already: `keep` trains its head further, and labels must be among its classes; `new` draws a
             fresh head whose classes are the labels.
    """

    type: Literal["classify"] = "classify"
    lm: NonNegativeFloat = 0.5
    classes: Literal["keep", "new"] = "keep"


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


class OnlineSettings(Spec):
    """What every objective has that learns from the model's own answers.

    reward       a reward model: the folder or name of a model with a score head, of the same tokenizer.
    rewards      judges by name, each with its weight or its settings (see `weft.rewards`); added to the reward model's number.
    samples      answers a prompt.
    max_tokens   of an answer; the longest one there is.
    temperature  at which answers are drawn; their log-probabilities are taken at the same one.
    stop         texts that end an answer, besides the tokenizer's end tokens.
    in_flight    answers that are written at a time.
    unfinished   what is done with an answer that did not end within max_tokens: `penalise` takes `penalty` from its reward, `mask` leaves
                 it out of the loss, `keep` treats it like the others.
    """

    reward: str | None = None
    rewards: dict[str, Any] = Field(default_factory=dict)
    samples: PositiveInt = 1
    max_tokens: PositiveInt = 128
    temperature: PositiveFloat = 1.0
    stop: tuple[str, ...] = ()
    in_flight: PositiveInt = 64
    unfinished: Literal["penalise", "mask", "keep"] = "penalise"
    penalty: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _judged(self) -> "OnlineSettings":
        if self.reward is None and not self.rewards:
            raise ValueError(
                "neither reward nor rewards is given, so nothing would tell good answers from bad ones; give the folder of a reward model, "
                f"or judges such as {{{next(iter(REWARDS))}: 1.0}}."
            )
        check_rewards(self.rewards)
        return self


class CriticSettings(Spec):
    """The critic of PPO: a model of its own that foretells the reward at every token.

    model  what it begins as: `reward` (the reward model, as InstructGPT has it), `policy` (with a fresh head), or a model's folder.
    optim  its optimiser's settings; None takes the policy's.
    """

    model: str = "reward"
    optim: OptimSettings | None = None


class PretrainSettings(Spec):
    """Next tokens of other text, learned beside the answers so that they are not forgotten (PPO-ptx).

    data    a path, or whatever a recipe may say under `data`.
    weight  of its loss a token (InstructGPT has 27.8).
    rows    of an update.
    """

    data: str | list[Any] | dict[str, Any]
    weight: PositiveFloat = 27.8
    rows: PositiveInt = 8


class PPOSettings(OnlineSettings):
    """Proximal policy optimisation from human feedback (Ziegler et al. 2019; InstructGPT, Ouyang et al. 2022, appendix C.4).

    reference          the model to stay near; None is the model that training began with.
    beta               price of a nat away from it, taken from the reward token by token.
    target, gain       of Ziegler's controller (section 2.2): nats an answer that beta is moved to hold; None keeps beta as it is.
    gamma, lam         discount, and lambda of generalised advantages (Schulman et al. 2016).
    clip, value_clip   how far ratio and value may move from where a rollout found them; None does not clip values.
    value_weight       of the critic's loss.
    epochs, minibatches  passes over a rollout, and the updates of each.
    critic, pretrain   see there.
    """

    type: Literal["ppo"] = "ppo"
    reference: str | None = None
    beta: NonNegativeFloat = 0.05
    target: PositiveFloat | None = None
    gain: PositiveFloat = 0.1
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    clip: PositiveFloat = 0.2
    value_clip: PositiveFloat | None = 0.2
    value_weight: PositiveFloat = 0.5
    epochs: PositiveInt = 4
    minibatches: PositiveInt = 1
    critic: CriticSettings = CriticSettings()
    pretrain: PretrainSettings | None = None

    @model_validator(mode="after")
    def _critic_begins(self) -> "PPOSettings":
        if self.critic.model == "reward" and self.reward is None:
            raise ValueError("critic.model is reward, but no reward model is given; give reward, or critic.model: policy.")
        if self.target is not None and self.beta == 0:
            raise ValueError(f"target is {self.target:g} but beta is 0, which the controller can only multiply; give beta a start above 0.")
        return self


class GRPOSettings(OnlineSettings):
    """Group-relative policy optimisation (Shao et al. 2024, equation 3): an answer is compared with others to the same prompt.

    samples        answers a prompt, a group.
    scale          divide a group's advantages by its standard deviation (off: Liu et al. 2025, Dr. GRPO).
    loss           how tokens are averaged: `grpo` in each answer, then over answers; `dapo` over all tokens (Yu et al. 2025); `dr_grpo`
                   over answers times max_tokens.
    beta           price of the divergence from the reference, by Schulman's estimator k3; 0 needs no reference.
    unbiased_kl    multiply k3 by the ratio, so that its gradient too is that of the divergence (DeepSeek-V3.2, section 3.1).
    clip, clip_high  the ratio stays within 1 - clip and 1 + clip_high (None: clip; DAPO has 0.28).
    """

    type: Literal["grpo"] = "grpo"
    samples: Annotated[int, Field(ge=2)] = 8
    reference: str | None = None
    scale: bool = True
    loss: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    beta: NonNegativeFloat = 0.04
    unbiased_kl: bool = False
    clip: PositiveFloat = 0.2
    clip_high: PositiveFloat | None = None
    epochs: PositiveInt = 1
    minibatches: PositiveInt = 1


class RejectionSettings(OnlineSettings):
    """Rejection sampling (Llama 2, Touvron et al. 2023, section 3.2.3): the best of several answers, learned like any other text.

    samples  answers a prompt.     keep  of them, the best.     epochs  passes over what was kept.
    """

    type: Literal["rejection"] = "rejection"
    samples: Annotated[int, Field(ge=2)] = 8
    keep: PositiveInt = 1
    epochs: PositiveInt = 1

    @model_validator(mode="after")
    def _rejects(self) -> "RejectionSettings":
        if self.keep >= self.samples:
            raise ValueError(f"keep is {self.keep} of {self.samples} samples, so nothing is rejected; keep fewer.")
        return self


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
    | Annotated[DistillSettings, Tag("distill")]
    | Annotated[PPOSettings, Tag("ppo")]
    | Annotated[GRPOSettings, Tag("grpo")]
    | Annotated[RejectionSettings, Tag("rejection")],
    Discriminator(_kind),
    BeforeValidator(_named),
]
