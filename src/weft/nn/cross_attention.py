"""Attention of the sequence over a memory that was written once: an encoder's output, an image, a prefix."""

import torch
from torch import Tensor, nn

from weft.errors import UserError
from weft.nn.attend import attend_grouped
from weft.nn.linear import Linear
from weft.nn.mixer import Side, Site, State, register
from weft.nn.step import Step
from weft.spec import CrossAttention as CrossAttentionSpec
from weft.spec import StateSpec


@register(CrossAttentionSpec)
class CrossAttention(nn.Module):
    """Keys and values of the memory are STATIC state, computed by `prime` once a request (Vaswani et al. 2017, section 3.2.3)."""

    def __init__(self, spec: CrossAttentionSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dim = spec, site.dim
        self.heads, self.groups, self.width = spec.heads, spec.num_kv_heads, spec.width(site.dim)
        self.dropout = site.dropout.attention
        self.q = Linear(site.dim, self.heads * self.width, site.init_std, spec.qkv_bias)
        self.kv = Linear(spec.memory_dim or site.dim, 2 * self.groups * self.width, site.init_std, spec.qkv_bias)
        self.out = Linear(self.heads * self.width, site.dim, site.residual_std, spec.out_bias)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"kv.weight": (self.groups * self.width, self.groups * self.width)}

    def state_spec(self) -> StateSpec:
        return self.spec.state(self.dim)

    def prime(self, memory: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Keys and values [B, memory_length, G, D] of a memory [B, S, M] whose rows have `lengths` [B] valid entries.

        Raises UserError when S exceeds the spec's memory_length.
        """
        batch, size, _ = memory.shape
        room = self.spec.memory_length - size
        if room < 0:
            raise UserError(
                f"the memory has {size} entries but the model takes at most {self.spec.memory_length}; "
                "shorten it or raise memory_length in the spec."
            )
        padded = torch.nn.functional.pad(memory, (0, 0, 0, room))
        k, v = self.kv(padded).view(batch, self.spec.memory_length, 2, self.groups, self.width).unbind(2)
        return {"k": k, "v": v, "n": lengths}

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        batch, length, _ = x.shape
        if views is None:
            if step.memory is None:
                raise UserError("this model attends to a memory, and none was given; pass memory=(entries [B, S, M], lengths [B]).")
            views = self.prime(*step.memory)
        q = self.q(x).view(batch, length, self.heads, self.width)
        slots = torch.arange(self.spec.memory_length, device=x.device)
        mask = (slots < views["n"][:, None])[:, None].expand(batch, length, -1)
        dropout = self.dropout if self.training else 0.0
        mixed = attend_grouped(q, views["k"].to(q.dtype), views["v"].to(q.dtype), mask, self.width**-0.5, dropout=dropout)
        return self.out(mixed.reshape(batch, length, -1)), Side()
