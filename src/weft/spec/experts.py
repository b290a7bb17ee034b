"""Spec of a mixture of experts: many gated units side by side, of which each token is sent through a few."""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from weft.spec.activations import Activation
from weft.spec.base import Spec, StateSpec


class Experts(Spec):
    """sum over the chosen e of weight_e * gated_e(x), plus the shared experts, which every token passes (Shazeer et al. 2017).

    experts       routed experts, each a gated unit of `hidden` channels.    top_k    experts a token is sent to.
    shared        shared experts: one gated unit of shared * hidden channels (DeepSeekMoE, Dai et al. 2024, equation 9).
    score         affinities of a token: softmax over all experts (Mixtral, Qwen3, DeepSeek-V2) or a sigmoid of each (DeepSeek-V3).
    normalise     weights of the chosen sum to one. With softmax that is Mixtral's softmax over the chosen logits alone.
    scale         factor of the routed experts' sum (`routed_scaling_factor`).
    groups        groups of neighbouring experts; a token may choose within its `top_groups` best alone, so that it visits few machines.
    group_score   a group's worth: "max" is its best affinity (V2), "top2" the sum of its two best (V3), both with `choice_bias`.
    choice_bias   a number an expert that is added to affinities for the choice and never to the weights (`e_score_correction_bias`,
                  Wang et al. 2024). It is no parameter: after an optimiser step it moves by `bias_speed`, up for experts with fewer
                  tokens than the average and down for those with more.
    balance_loss  weight of the loss E sum_e f_e P_e (Switch, Fedus et al. 2021, equation 4; f over the k choices of a token: 1 when
                  balanced). `balance_over` "sequence" takes it over each row (DeepSeek-V3, equation 17) and adds up exactly over
                  micro-batches; "batch" takes it over the tokens of a micro-batch, and so depends on its size.
    z_loss        weight of the squared log-partition function of the router's logits (ST-MoE, Zoph et al. 2022, equation 5).
    capacity      None, or a factor: an expert takes at most ceil(capacity * k * tokens / experts) of a training pass, in their order,
                  and the others skip it. Evaluation and generation never drop.
    """

    type: Literal["experts"] = "experts"
    experts: PositiveInt
    top_k: PositiveInt
    hidden: PositiveInt
    activation: Activation = "silu"
    shared: NonNegativeInt = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: PositiveFloat = 1.0
    groups: PositiveInt = 1
    top_groups: PositiveInt = 1
    group_score: Literal["max", "top2"] = "max"
    choice_bias: bool = False
    bias_speed: NonNegativeFloat = 0.001
    balance_loss: NonNegativeFloat = 0.0
    balance_over: Literal["sequence", "batch"] = "sequence"
    z_loss: NonNegativeFloat = 0.0
    capacity: PositiveFloat | None = None

    @model_validator(mode="after")
    def _choosable(self) -> "Experts":
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k} but there are {self.experts} experts; lower top_k or add experts.")
        if self.experts % self.groups:
            raise ValueError(f"{self.experts} experts do not divide into {self.groups} groups; groups must divide experts.")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups is {self.top_groups} but there are {self.groups} groups; it must be from 1 to groups.")
        within = self.top_groups * self.experts // self.groups
        if self.top_k > within:
            raise ValueError(
                f"top_k is {self.top_k} but {self.top_groups} of {self.groups} groups hold {within} experts; "
                "raise top_groups or lower top_k."
            )
        if self.group_score == "top2" and self.groups > 1 and self.experts == self.groups:
            raise ValueError(f"group_score is top2 but a group has 1 of the {self.experts} experts; use fewer groups or group_score max.")
        return self

    @property
    def shared_hidden(self) -> int:
        """Channels of the shared experts' one gated unit; 0 where there are none."""
        return self.shared * self.hidden

    def num_params(self, dim: int) -> int:
        """Router and all experts; `choice_bias` is not trained and does not count."""
        return self._with_experts(dim, self.experts)

    def active_params(self, dim: int) -> int:
        """Those that one token passes through."""
        return self._with_experts(dim, self.top_k)

    def flops(self, dim: int, length: int) -> int:
        return 2 * length * self.active_params(dim)

    def state(self, dim: int) -> StateSpec:
        return {}

    def auxiliary(self) -> dict[str, float]:
        """Losses its module hands out in training, and their weights."""
        weights = {"balance": self.balance_loss, "router_z": self.z_loss}
        return {name: weight for name, weight in weights.items() if weight}

    def _with_experts(self, dim: int, experts: int) -> int:
        return dim * self.experts + 3 * dim * self.hidden * (experts + self.shared)
