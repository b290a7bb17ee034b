"""Self-attention: multi-head, multi-query and grouped-query, with an optional sliding window."""

import torch
from torch import Tensor, nn

from weft.nn.attend import attend_fused, attend_grouped
from weft.nn.attend_blocked import MAX_LENGTH, attend_blocked, causal_bias
from weft.nn.attend_in_place import AttendSettings, attend_in_place, can_attend_in_place
from weft.nn.linear import Linear
from weft.nn.mixer import Side, Site, State, register
from weft.nn.norm import build_norm
from weft.nn.rope import Rope, rotate
from weft.nn.step import Step, allowed
from weft.spec import Attention as AttentionSpec
from weft.spec import StateSpec


@register(AttentionSpec)
class Attention(nn.Module):
    """Keys and values are APPEND state, or RING state under a window (Mistral, Jiang et al. 2023, section 2).

    One fused projection `qkv` holds queries, then keys, then values.
    """

    def __init__(self, spec: AttentionSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dim = spec, site.dim
        self.heads, self.groups, self.width = spec.heads, spec.num_kv_heads, spec.width(site.dim)
        self.scale = (spec.scale or self.width**-0.5) * (spec.rope.score_factor if spec.rope else 1.0)
        self.settings = AttendSettings(self.heads, self.scale, spec.window or 0, spec.softcap or 0.0)
        self.dropout = site.dropout.attention
        self.qkv = Linear(site.dim, (self.heads + 2 * self.groups) * self.width, site.init_std, spec.qkv_bias)
        self.out = Linear(self.heads * self.width, site.dim, site.residual_std, spec.out_bias)
        self.q_norm = build_norm(spec.qk_norm, self.width) if spec.qk_norm else None
        self.k_norm = build_norm(spec.qk_norm, self.width) if spec.qk_norm else None
        self.rope = Rope(spec.rope, self.width) if spec.rope else None

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qkv.weight": (self.heads * self.width, self.groups * self.width, self.groups * self.width)}

    def state_spec(self) -> StateSpec | None:
        return self.spec.state(self.dim)

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.width)
        if views is not None and can_attend_in_place(heads, views["k"], views["v"]):
            return self.out(self._attend_in_place(heads, step, views).view(batch, length, -1)), Side()
        q, k, v = self._turned(heads, step)
        if views is None:
            mixed = self._attend_parallel(q, k, v, step)
        else:
            k, v, mask = self._remembered(k, v, step, views)
            mixed = attend_grouped(q, k, v, mask, self.scale, self.spec.softcap)
        return self.out(mixed.reshape(batch, length, -1)), Side()

    def _turned(self, heads: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of heads [B, T, H + 2 G, D], normalised and rotated."""
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            cos, sin = self.rope.tables(step)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def _remembered(self, k: Tensor, v: Tensor, step: Step, views: State) -> tuple[Tensor, Tensor, Tensor]:
        """Write this pass's keys and values [B, T, G, D] and read all there are [B, K, G, D], with the mask [B, T, K] of queries over them."""
        views["k"].write(k, step)
        views["v"].write(v, step)
        (keys, positions), (values, _) = views["k"].read(step), views["v"].read(step)
        mask = step.once(("mask", self.spec.window, keys.shape[1]), lambda: allowed(step, positions, self.spec.window))
        return keys.to(k.dtype), values.to(v.dtype), mask

    def _attend_in_place(self, heads: Tensor, step: Step, views: State) -> Tensor:
        """The same by kernels that turn, write and read without a copy: heads [B, T, H + 2 G, D] -> [B, T, H, D]."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = heads.split([self.heads, self.groups, self.groups], dim=2)
            heads = torch.cat([self.q_norm(q), self.k_norm(k), v], 2)
        tables = (None, None) if self.rope is None else self.rope.tables(step)
        return attend_in_place(heads, tables, views["k"], views["v"], step, self.settings)

    def _attend_parallel(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0 and self._suits_blocks(q, step):
            rows = step.positions[:1] if step.plain else step.positions  # whole documents are all alike
            bias = step.once(("causal bias", self.spec.window), lambda: causal_bias(rows, self.spec.window))
            return attend_blocked(q, k, v, bias, self.scale, self.spec.window)
        if self.spec.causal and step.plain and self.spec.softcap is None and (self.spec.window or q.shape[1]) >= q.shape[1]:
            return attend_fused(q, k, v, None, self.scale, dropout)
        mask = self._parallel_mask(step)
        if self.spec.softcap is None:
            return attend_fused(q, k, v, mask, self.scale, dropout)
        return attend_grouped(q, k, v, mask, self.scale, self.spec.softcap, dropout)

    def _suits_blocks(self, q: Tensor, step: Step) -> bool:
        """On a CPU, over rows in which a later token is never a key: whole documents, or documents packed one after another."""
        ordered = step.plain or step.segments is not None
        return q.device.type == "cpu" and q.shape[1] <= MAX_LENGTH and ordered and self.spec.causal and self.spec.softcap is None

    def _parallel_mask(self, step: Step) -> Tensor:
        """Which of a parallel pass's own keys each of its queries may see, bool [B, T, T]."""
        return step.once(("parallel mask", self.spec.causal, self.spec.window), lambda: self._make_parallel_mask(step))

    def _make_parallel_mask(self, step: Step) -> Tensor:
        if self.spec.causal:
            return allowed(step, step.positions, self.spec.window)
        mask = step.valid[:, None, :] | torch.eye(step.length, dtype=torch.bool, device=step.valid.device)
        if step.segments is not None:
            mask = mask & (step.segments[:, :, None] == step.segments[:, None, :])
        return mask.expand(-1, step.length, -1)
