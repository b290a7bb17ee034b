"""The spec of multi-head latent attention (DeepSeek-V2)."""

from typing import Literal

from pydantic import PositiveInt, model_validator

from weft.spec.base import Leaf, Spec, StateSpec
from weft.spec.norms import Norm, RMSNorm
from weft.spec.positions import Rope


class LatentAttention(Spec):
    """Attention whose keys and values are made from one small latent a token, which is all that is remembered besides a rotated key
    that all heads share (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1; DeepSeek-V3, section 2.1.1).

    kv_rank         channels of the latent that keys and values are made from.
    q_rank          channels of the latent that queries are made from; None makes them from the layer's input (DeepSeek-V2-Lite).
    nope_head_dim   channels of a head's queries and keys that carry no position.
    rope_head_dim   channels of a head's queries, and of the shared key, that are rotated.
    v_head_dim      channels of a head's values; None is nope_head_dim.
    norm            of both latents.

    Scores are scaled by (nope_head_dim + rope_head_dim) ** -0.5, and by the rotation's own factor where it has one.
    """

    type: Literal["latent_attention"] = "latent_attention"
    heads: PositiveInt
    kv_rank: PositiveInt
    q_rank: PositiveInt | None = None
    nope_head_dim: PositiveInt
    rope_head_dim: PositiveInt
    v_head_dim: PositiveInt | None = None
    rope: Rope = Rope()
    norm: Norm = RMSNorm(eps=1e-6)

    @model_validator(mode="after")
    def _pairs(self) -> "LatentAttention":
        if self.rope_head_dim % 2:
            raise ValueError(f"rope_head_dim is {self.rope_head_dim}; channels are rotated in pairs: give an even number.")
        return self

    @property
    def qk_width(self) -> int:
        """Channels of one head's queries and keys."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def v_width(self) -> int:
        """Channels of one head's values."""
        return self.v_head_dim or self.nope_head_dim

    @property
    def scale(self) -> float:
        """The factor on scores."""
        factor: float = self.qk_width**-0.5 * self.rope.score_factor
        return factor

    def down_rows(self) -> tuple[int, int, int]:
        """Rows of the fused projection of the layer's input: query latent (or queries), key-value latent, shared rotated key."""
        return self.q_rank or self.heads * self.qk_width, self.kv_rank, self.rope_head_dim

    def _weights(self, dim: int) -> int:
        up = self.kv_rank * self.heads * (self.nope_head_dim + self.v_width) + (self.q_rank or 0) * self.heads * self.qk_width
        return dim * sum(self.down_rows()) + up + self.heads * self.v_width * dim

    def num_params(self, dim: int) -> int:
        norms = self.norm.num_params(self.kv_rank) + (self.norm.num_params(self.q_rank) if self.q_rank else 0)
        return self._weights(dim) + norms

    def flops(self, dim: int, length: int) -> int:
        pairs = length * (length + 1) // 2
        return 2 * length * self._weights(dim) + 2 * pairs * self.heads * (self.qk_width + self.v_width)

    def state(self, dim: int) -> StateSpec:
        return {"latent": Leaf("append", (self.kv_rank,)), "rope_key": Leaf("append", (self.rope_head_dim,))}

    def grouped_state(self, groups: int) -> StateSpec:
        """What attention with as many heads of as many channels would remember if `groups` of them shared keys and values: as many as there
        are heads is multi-head, 1 multi-query attention (DeepSeek-V2, table 1)."""
        leaf = Leaf("append", (groups, self.v_width), shard=0)
        return {"k": leaf, "v": leaf}
