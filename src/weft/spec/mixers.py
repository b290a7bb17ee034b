"""Specs of the layers that mix along the sequence.

Each answers, without torch: `num_params(dim)`, `flops(dim, length)` of one forward pass over `length` tokens (a multiply and an
add are two), and `state(dim)`, the decode state it keeps. `state` is None for a mixer that cannot run incrementally.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from weft.spec.base import Leaf, Spec, StateSpec
from weft.spec.latent import LatentAttention
from weft.spec.norms import Norm
from weft.spec.patterns import Band, Pattern
from weft.spec.positions import Rope


class _Heads(Spec):
    """The head arithmetic that self- and cross-attention share."""

    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    @model_validator(mode="after")
    def _groups_divide(self) -> "_Heads":
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads is {self.heads} and kv_heads {self.num_kv_heads}; heads must be a multiple of kv_heads.")
        return self

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    def width(self, dim: int) -> int:
        """Channels of one head in a model of width `dim`."""
        if self.head_dim is None and dim % self.heads:
            raise ValueError(f"dim is {dim} and heads {self.heads}; dim must be a multiple of heads, or head_dim must be given.")
        return self.head_dim or dim // self.heads


class Attention(_Heads):
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1): MHA, MQA and GQA by `kv_heads`.

    window       a query sees the last `window` keys, its own included (Mistral); None sees all.
    pattern      a sparse pattern in place of a window: strided, fixed, dilated or streaming.
    causal       False sees the whole sequence, and then there is no incremental decoding.
    softcap      scores become softcap * tanh(scores / softcap) (Gemma 2).
    scale        factor on the scores; None is head_dim ** -0.5.
    qk_norm      a norm over each head's queries and keys before the rotation (Qwen 3).
    sink_logits  a learned logit a head in the softmax's denominator, so that a head may look at nothing (gpt-oss, OpenAI 2025).
    """

    type: Literal["attention"] = "attention"
    window: PositiveInt | None = None
    pattern: Pattern | None = None
    causal: bool = True
    rope: Rope | None = None
    qk_norm: Norm | None = None
    softcap: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    sink_logits: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "Attention":
        for name, given in (("window", self.window), ("pattern", self.pattern)):
            if given is not None and not self.causal:
                raise ValueError(f"{name} is given with causal: false; a {name} needs causal attention: drop one of the two.")
        if self.window is not None and self.pattern is not None:
            raise ValueError(
                f"window and a {self.pattern.type} pattern are both given; a layer has one of them: a pattern that needs a window holds it."
            )
        if self.rope is not None and self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one.")
        return self

    @property
    def band(self) -> Band | None:
        """What a query sees, where that is a window, with or without gaps and pinned positions."""
        if self.window is not None:
            return Band(self.window)
        return self.pattern.band if self.pattern is not None else None

    def num_params(self, dim: int) -> int:
        query, key = self.heads * self.width(dim), self.num_kv_heads * self.width(dim)
        norms = 2 * self.qk_norm.num_params(self.width(dim)) if self.qk_norm else 0
        biases = self.qkv_bias * (query + 2 * key) + self.out_bias * dim + self.sink_logits * self.heads
        return dim * (query + 2 * key) + query * dim + biases + norms

    def flops(self, dim: int, length: int) -> int:
        query, key = self.heads * self.width(dim), self.num_kv_heads * self.width(dim)
        rule = self.band or self.pattern
        if rule is not None:
            pairs = rule.pairs(length)
        else:
            pairs = length * (length + 1) // 2 if self.causal else length * length
        return 2 * length * dim * (2 * query + 2 * key) + 4 * pairs * query

    def state(self, dim: int) -> StateSpec | None:
        if not self.causal:
            return None
        shape, rule = (self.num_kv_heads, self.width(dim)), self.band or self.pattern
        if rule is None or rule.reach is None:
            leaf = Leaf("append", shape, shard=0)
        else:
            leaf = Leaf("ring", shape, rule.reach, pinned=rule.pinned, shard=0)
        return {"k": leaf, "v": leaf}


class CrossAttention(_Heads):
    """Attention of the sequence over a memory that is written once a request (Vaswani et al. 2017, section 3.2.3).

    memory_length   the most entries a memory may have.
    memory_dim      channels of a memory entry; None is the model's dim.
    """

    type: Literal["cross_attention"] = "cross_attention"
    memory_length: PositiveInt
    memory_dim: PositiveInt | None = None

    def num_params(self, dim: int) -> int:
        query, key = self.heads * self.width(dim), self.num_kv_heads * self.width(dim)
        biases = self.qkv_bias * (query + 2 * key) + self.out_bias * dim
        return dim * query + (self.memory_dim or dim) * 2 * key + query * dim + biases

    def flops(self, dim: int, length: int) -> int:
        query, key = self.heads * self.width(dim), self.num_kv_heads * self.width(dim)
        prime = 2 * self.memory_length * (self.memory_dim or dim) * 2 * key
        return prime + 2 * length * dim * 2 * query + 4 * length * self.memory_length * query

    def state(self, dim: int) -> StateSpec:
        leaf = Leaf("static", (self.memory_length, self.num_kv_heads, self.width(dim)), shard=1)
        return {"k": leaf, "v": leaf, "n": Leaf("static", (), dtype="int64")}


class _Recurrent(Spec):
    """What LSTM and GRU share: a hidden width and a projection back to `dim` where the two differ."""

    hidden: PositiveInt | None = None

    def width(self, dim: int) -> int:
        return self.hidden or dim

    def _gated_params(self, dim: int, gates: int) -> int:
        hidden = self.width(dim)
        return gates * hidden * (dim + hidden + 2) + (hidden * dim if hidden != dim else 0)

    def _gated_flops(self, dim: int, length: int, gates: int) -> int:
        hidden = self.width(dim)
        return 2 * length * (gates * hidden * (dim + hidden) + (hidden * dim if hidden != dim else 0))


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with Gers et al.'s forget gate), torch's gate order."""

    type: Literal["lstm"] = "lstm"

    def num_params(self, dim: int) -> int:
        return self._gated_params(dim, 4)

    def flops(self, dim: int, length: int) -> int:
        return self._gated_flops(dim, length, 4)

    def state(self, dim: int) -> StateSpec:
        return {"h": Leaf("fixed", (self.width(dim),)), "c": Leaf("fixed", (self.width(dim),))}


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al. 2014) in the reset-after form that torch computes."""

    type: Literal["gru"] = "gru"

    def num_params(self, dim: int) -> int:
        return self._gated_params(dim, 3)

    def flops(self, dim: int, length: int) -> int:
        return self._gated_flops(dim, length, 3)

    def state(self, dim: int) -> StateSpec:
        return {"h": Leaf("fixed", (self.width(dim),))}


class Mamba(Spec):
    """Selective state space layer (Gu and Dao 2023, algorithm 2).

    expand   inner channels are expand * dim.      state_dim   state entries a channel.
    conv     taps of the causal convolution.       dt_rank     rank of the step-size projection; None is ceil(dim / 16).
    """

    type: Literal["mamba"] = "mamba"
    expand: PositiveInt = 2
    state_dim: PositiveInt = 16
    conv: PositiveInt = Field(4, ge=2)
    dt_rank: PositiveInt | None = None
    conv_bias: bool = True
    bias: bool = False

    def inner(self, dim: int) -> int:
        return self.expand * dim

    def rank(self, dim: int) -> int:
        return self.dt_rank or math.ceil(dim / 16)

    def num_params(self, dim: int) -> int:
        inner, rank = self.inner(dim), self.rank(dim)
        convolution = inner * (self.conv + self.conv_bias)
        selection = inner * (rank + 2 * self.state_dim) + rank * inner + inner
        return dim * 2 * inner + convolution + selection + inner * self.state_dim + inner + inner * dim + self.bias * (2 * inner + dim)

    def flops(self, dim: int, length: int) -> int:
        inner, rank = self.inner(dim), self.rank(dim)
        products = dim * 2 * inner + inner * (self.conv + rank + 2 * self.state_dim) + rank * inner + inner * dim
        return 2 * length * products + 9 * length * inner * self.state_dim  # the paper's scan: 9 a state entry

    def state(self, dim: int) -> StateSpec:
        inner = self.inner(dim)
        return {
            "conv": Leaf("fixed", (self.conv - 1, inner), shard=1),
            "h": Leaf("fixed", (inner, self.state_dim), dtype="float32", shard=0),
        }


from weft.spec.entmax import EntmaxAttention as EntmaxAttention  # noqa: E402  (it is made of what stands above)

Mixer = Annotated[Attention | CrossAttention | EntmaxAttention | LatentAttention | LSTM | GRU | Mamba, Field(discriminator="type")]
