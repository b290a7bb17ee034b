"""Multi-head latent attention: keys and values made from one small latent a token (DeepSeek-V2 and V3)."""

import torch
from torch import Tensor, nn

from weft import kernels
from weft.nn.attend import attend_fused
from weft.nn.attend_blocked import MAX_LENGTH, attend_blocked, causal_bias
from weft.nn.attend_latent import attend_absorbed, attend_expanded, expand, expanding_pays_from
from weft.nn.fill import fill_normal
from weft.nn.linear import Linear
from weft.nn.mixer import Side, Site, State, register
from weft.nn.norm import build_norm
from weft.nn.rope import Rope, rotate
from weft.nn.step import Step, allowed
from weft.spec import LatentAttention as LatentAttentionSpec
from weft.spec import StateSpec


@register(LatentAttentionSpec)
class LatentAttention(nn.Module):
    """The normed latent and the rotated shared key are APPEND state (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).

    down   fused projection of the input: query latent (without compression the queries), key-value latent, shared key.
    q_up   from the query latent to the queries of each head: its channels without position, then its rotated ones.
    kv_up  [H (N + V), R], from the key-value latent to a head's key, then its value. It is multiplied from both sides, which rows packed
           along one side cannot be, so a quantised model keeps it as it is: a two-hundredth of the weights of DeepSeek-V2-Lite.

    Keys and values are written out in the parallel pass; over state they never are, however long the pass, so that what a token gets
    depends neither on its chunk nor on its company. Where the user lets it (`Model.fast`), long passes write them out as well.
    """

    def __init__(self, spec: LatentAttentionSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dim, self.std = spec, site.dim, site.init_std
        self.heads, self.nope, self.rotated = spec.heads, spec.nope_head_dim, spec.rope_head_dim
        self.scale, self.sizes = spec.scale, list(spec.down_rows())
        self.pays_from = expanding_pays_from(spec.kv_rank, spec.nope_head_dim, spec.v_width)
        self.dropout = site.dropout.attention
        self.down = Linear(site.dim, sum(self.sizes), site.init_std)
        self.q_norm = build_norm(spec.norm, spec.q_rank) if spec.q_rank else None
        self.q_up = Linear(spec.q_rank, spec.heads * spec.qk_width, site.init_std) if spec.q_rank else None
        self.kv_norm = build_norm(spec.norm, spec.kv_rank)
        self.kv_up = nn.Parameter(torch.empty(spec.heads * (spec.nope_head_dim + spec.v_width), spec.kv_rank))
        self.out = Linear(spec.heads * spec.v_width, site.dim, site.residual_std)
        self.rope = Rope(spec.rope, spec.rope_head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_normal(self.kv_up, self.std)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"down.weight": tuple(self.sizes), "kv_up": (self.kv_up.shape[0],)}

    def state_spec(self) -> StateSpec:
        return self.spec.state(self.dim)

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        batch, length, _ = x.shape
        q, latent, rope_key = self.down(x).split(self.sizes, -1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        q_nope, q_rope = q.view(batch, length, self.heads, -1).split([self.nope, self.rotated], -1)
        cos, sin = self.rope.tables(step)
        q_rope, rope_key = rotate(q_rope, cos, sin), rotate(rope_key[:, :, None], cos, sin)[:, :, 0]
        latent = self.kv_norm(latent)
        if views is None:
            mixed = self._attend_parallel(torch.cat([q_nope, q_rope], -1), latent, rope_key, step)
        else:
            views["latent"].write(latent, step)
            views["rope_key"].write(rope_key, step)
            (latent, positions), (rope_key, _) = views["latent"].read(step), views["rope_key"].read(step)
            mask = step.once(("latent mask", latent.shape[1]), lambda: allowed(step, positions))
            attend = attend_expanded if self._may_expand(length) else attend_absorbed
            mixed = attend(q_nope, q_rope, latent.to(x.dtype), rope_key.to(x.dtype), self.kv_up, mask, self.scale)
        return self.out(mixed.reshape(batch, length, -1)), Side()

    def _may_expand(self, length: int) -> bool:
        return self.pays_from is not None and length >= self.pays_from and kernels.coarse()

    def _attend_parallel(self, q: Tensor, latent: Tensor, rope_key: Tensor, step: Step) -> Tensor:
        k, v = expand(latent, rope_key, self.kv_up, self.heads, self.nope)
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0 and q.device.type == "cpu" and step.length <= MAX_LENGTH and (step.plain or step.segments is not None):
            rows = step.positions[:1] if step.plain else step.positions  # whole documents are all alike
            bias = step.once(("causal bias", None), lambda: causal_bias(rows, None))
            return attend_blocked(q, k, v, bias, self.scale)
        if step.plain:
            return attend_fused(q, k, v, None, self.scale, dropout)
        mask = step.once("latent parallel mask", lambda: allowed(step, step.positions))
        return attend_fused(q, k, v, mask, self.scale, dropout)
