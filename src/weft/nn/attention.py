"""Self-attention: multi-head, multi-query and grouped-query, with an optional sliding window or sparse pattern."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weft.nn.attend import attend_fused, attend_grouped
from weft.nn.attend_banded import attend_banded, attend_strided, with_sink
from weft.nn.attend_blocked import HIDDEN, MAX_LENGTH, attend_blocked, causal_bias
from weft.nn.attend_flex import attend_flex, block_mask, suits_flex
from weft.nn.attend_in_place import AttendSettings, attend_in_place, can_attend_in_place
from weft.nn.fill import fill_normal
from weft.nn.linear import Linear
from weft.nn.mixer import Side, Site, State, register
from weft.nn.norm import build_norm
from weft.nn.rope import Rope, rotate
from weft.nn.step import Step, allowed
from weft.spec import Attention as AttentionSpec
from weft.spec import StateSpec, Strided

if TYPE_CHECKING:
    from weft.nn.adapters.virtual import LayerPrefix


@register(AttentionSpec)
class Attention(nn.Module):
    """Keys and values are APPEND state, or RING state where a query looks back a bounded way (Mistral, Jiang et al. 2023, section 2).

    One fused projection `qkv` holds queries, then keys, then values.
    """

    def __init__(self, spec: AttentionSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dim = spec, site.dim
        self.heads, self.groups, self.width = spec.heads, spec.num_kv_heads, spec.width(site.dim)
        self.scale = (spec.scale or self.width**-0.5) * (spec.rope.score_factor if spec.rope else 1.0)
        self.band, self.pattern = spec.band, spec.pattern
        self.rule = f"{spec.window} {spec.pattern!r}"  # a string, because the compiler cannot look into a spec's hash
        self.settings = AttendSettings(self.heads, self.scale, spec.window or 0, spec.softcap or 0.0)
        self.kernel_knows = spec.pattern is None and not spec.sink_logits
        self.dropout = site.dropout.attention
        self.qkv = Linear(site.dim, (self.heads + 2 * self.groups) * self.width, site.init_std, spec.qkv_bias)
        self.out = Linear(self.heads * self.width, site.dim, site.residual_std, spec.out_bias)
        self.q_norm = build_norm(spec.qk_norm, self.width) if spec.qk_norm else None
        self.k_norm = build_norm(spec.qk_norm, self.width) if spec.qk_norm else None
        self.rope = Rope(spec.rope, self.width) if spec.rope else None
        self.sink = nn.Parameter(torch.zeros(self.heads)) if spec.sink_logits else None
        self.prefix: LayerPrefix | None = None  # keys and values of virtual tokens, where there are some
        self.init_std = site.init_std

    def reset_parameters(self) -> None:
        if self.sink is not None:
            fill_normal(self.sink, self.init_std)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qkv.weight": (self.heads * self.width, self.groups * self.width, self.groups * self.width)}

    def state_spec(self) -> StateSpec | None:
        return self.spec.state(self.dim)

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.width)
        if views is not None and self.kernel_knows and self.prefix is None and can_attend_in_place(heads, views["k"], views["v"]):
            return self.out(self._attend_in_place(heads, step, views).view(batch, length, -1)), Side()
        q, k, v = self._turned(heads, step)
        if views is None:
            mixed = self._attend_parallel(q, k, v, step)
        else:
            k, v, mask = self._remembered(k, v, step, views)
            mixed = attend_grouped(q, k, v, mask, self.scale, self.spec.softcap, sink=self.sink)
        return self.out(mixed.reshape(batch, length, -1)), Side()

    def _turned(self, heads: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of heads [B, T, H + 2 G, D], normalised and rotated; those of virtual tokens as they were learned."""
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            cos, sin = self.rope.tables(step)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.prefix is not None:
            k, v = self.prefix.put(k, v, step)
        return q, k, v

    def _remembered(self, k: Tensor, v: Tensor, step: Step, views: State) -> tuple[Tensor, Tensor, Tensor]:
        """Write this pass's keys and values [B, T, G, D] and read all there are [B, K, G, D], with the queries' mask [B, T, K]."""
        views["k"].write(k, step)
        views["v"].write(v, step)
        (keys, positions), (values, _) = views["k"].read(step), views["v"].read(step)
        mask = step.once(("mask", self.rule, keys.shape[1]), lambda: allowed(step, positions, self.spec.window, self.pattern))
        return keys.to(k.dtype), values.to(v.dtype), mask

    def _attend_in_place(self, heads: Tensor, step: Step, views: State) -> Tensor:
        """The same by kernels that turn, write and read without a copy: heads [B, T, H + 2 G, D] -> [B, T, H, D]."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = heads.split([self.heads, self.groups, self.groups], dim=2)
            heads = torch.cat([self.q_norm(q), self.k_norm(k), v], 2)
        tables = (None, None) if self.rope is None else self.rope.tables(step)
        return attend_in_place(heads, tables, views["k"], views["v"], step, self.settings)

    def _attend_parallel(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        dropout, softcap = self.dropout if self.training else 0.0, self.spec.softcap
        ordered = self.spec.causal and (step.plain or step.segments is not None)  # then a later token of a row is never a key
        if dropout == 0.0 and ordered and q.device.type == "cpu":
            rows = None if step.plain else step.positions
            if self.band is not None and self._suits_bands(q.shape[1]):
                return self._with_sink(*attend_banded(q, k, v, rows, self.band, self.scale, softcap))
            if self.band is None and isinstance(self.pattern, Strided) and q.shape[1] > self.pattern.stride:
                return self._with_sink(*attend_strided(q, k, v, rows, self.pattern, self.scale, softcap))
            if q.shape[1] <= MAX_LENGTH and softcap is None and self.sink is None:
                bias = step.once(("causal bias", self.rule), lambda: self._bias(step))
                return attend_blocked(q, k, v, bias, self.scale, self.spec.window)
        sparse = self.band or self.pattern
        if dropout == 0.0 and ordered and sparse is not None and suits_flex(q) and not self._sees_all(q.shape[1]):
            blocks = step.once(("block mask", self.rule), lambda: block_mask(step, sparse))
            return self._with_sink(*attend_flex(q, k, v, blocks, self.scale, softcap))
        plain = softcap is None and self.sink is None
        if plain and self.spec.causal and step.plain and self._sees_all(q.shape[1]):
            return attend_fused(q, k, v, None, self.scale, dropout)
        mask = self._parallel_mask(step)
        if plain:
            return attend_fused(q, k, v, mask, self.scale, dropout)
        return attend_grouped(q, k, v, mask, self.scale, softcap, dropout, self.sink)

    def _with_sink(self, mixed: Tensor, logs: Tensor) -> Tensor:
        return mixed if self.sink is None else with_sink(mixed, logs, self.sink)

    def _sees_all(self, length: int) -> bool:
        return self.pattern is None and (self.spec.window or length) >= length

    def _suits_bands(self, length: int) -> bool:
        """Whether the band is narrower than the text, and one that blocks of a short text do not compute."""
        assert self.band is not None
        other = self.pattern is not None or self.spec.softcap is not None or self.sink is not None
        return self.band.reach < length and (other or length > MAX_LENGTH)

    def _bias(self, step: Step) -> Tensor:
        """What `attend_blocked` adds to scores: float32 [1 or B, T, T]."""
        rows = 1 if step.plain else step.positions.shape[0]  # whole documents are all alike
        if self.pattern is None:
            return causal_bias(step.positions[:rows], self.spec.window)
        mask = self._parallel_mask(step)[:rows]
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, HIDDEN)

    def _parallel_mask(self, step: Step) -> Tensor:
        """Which of a parallel pass's own keys each of its queries may see, bool [B, T, T]."""
        return step.once(("parallel mask", self.spec.causal, self.rule), lambda: self._make_parallel_mask(step))

    def _make_parallel_mask(self, step: Step) -> Tensor:
        if self.spec.causal:
            return allowed(step, step.positions, self.spec.window, self.pattern)
        mask = step.valid[:, None, :] | torch.eye(step.length, dtype=torch.bool, device=step.valid.device)
        if step.segments is not None:
            mask = mask & (step.segments[:, :, None] == step.segments[:, None, :])
        return mask.expand(-1, step.length, -1)
