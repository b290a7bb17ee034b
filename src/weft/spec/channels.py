"""Specs of the layers that mix along the channels of one token. They answer the same questions as mixers do."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from weft.spec.activations import Activation
from weft.spec.base import Leaf, Spec, StateSpec
from weft.spec.experts import Experts


class MLP(Spec):
    """Two projections around an activation (Vaswani et al. 2017, equation 2)."""

    type: Literal["mlp"] = "mlp"
    hidden: PositiveInt
    activation: Activation = "gelu_tanh"
    bias: bool = True

    def num_params(self, dim: int) -> int:
        return 2 * dim * self.hidden + self.bias * (self.hidden + dim)

    def flops(self, dim: int, length: int) -> int:
        return 4 * length * dim * self.hidden

    def state(self, dim: int) -> StateSpec:
        return {}


class Gated(Spec):
    """Gated linear unit (Shazeer 2020): down(activation(gate(x)) * up(x)); SwiGLU with silu, GeGLU with gelu."""

    type: Literal["gated"] = "gated"
    hidden: PositiveInt
    activation: Activation = "silu"
    bias: bool = False

    def num_params(self, dim: int) -> int:
        return 3 * dim * self.hidden + self.bias * (2 * self.hidden + dim)

    def flops(self, dim: int, length: int) -> int:
        return 6 * length * dim * self.hidden

    def state(self, dim: int) -> StateSpec:
        return {}


class RWKVChannelMix(Spec):
    """RWKV's channel mixing (Peng et al. 2023, equations 18 to 20): squared ReLU, a receptance gate, and a token shift."""

    type: Literal["rwkv_channel_mix"] = "rwkv_channel_mix"
    hidden: PositiveInt

    def num_params(self, dim: int) -> int:
        return 2 * dim * self.hidden + dim * dim + 2 * dim

    def flops(self, dim: int, length: int) -> int:
        return 2 * length * (2 * dim * self.hidden + dim * dim)

    def state(self, dim: int) -> StateSpec:
        return {"shift": Leaf("fixed", (dim,))}


Channel = Annotated[MLP | Gated | Experts | RWKVChannelMix, Field(discriminator="type")]
