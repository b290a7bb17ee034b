"""Multi-token prediction: what foretells tokens beyond the next one, for training and for drafts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.nn.block import Sides, build_block
from weft.nn.linear import Linear
from weft.nn.mixer import Site
from weft.nn.norm import build_norm
from weft.nn.step import Step
from weft.spec import ModelSpec


class MTPModule(nn.Module):
    """One depth of multi-token prediction (DeepSeek-V3, DeepSeek-AI 2024, equations 21 to 23; Gloeckle et al. 2024, section 2).

    The sequential form reads the hidden states of the depth before and the embeddings of tokens further on, through a norm each and one
    projection; the independent form reads the model's hidden states as they are. Then a block, and the norm before the shared head. Names
    are those of DeepSeek's checkpoints, whose projection reads the embedding first, the other way round than the paper writes it.
    """

    def __init__(self, spec: ModelSpec, site: Site) -> None:
        super().__init__()
        assert spec.mtp is not None
        sequential = spec.mtp.type == "sequential"
        self.enorm = build_norm(spec.norm, spec.dim) if sequential else None
        self.hnorm = build_norm(spec.norm, spec.dim) if sequential else None
        self.eh_proj = Linear(2 * spec.dim, spec.dim, site.init_std) if sequential else None
        self.block = build_block(spec.blocks()[-1], site)
        self.norm = build_norm(spec.norm, spec.dim) if spec.final_norm else None

    def forward(self, hidden: Tensor, ahead: Tensor | None, step: Step, views: Mapping[str, Any] | None = None) -> tuple[Tensor, Sides]:
        """hidden [B, T, D] -> [B, T, D], ready for the head.

        hidden  the depth before's: for the first one, the model's own after its final norm.
        ahead   [B, T, D] embeddings of the tokens that this depth may see, k places on at depth k; the independent form takes None.
        step    the model's own: a token's position is that of its hidden state.
        """
        if self.eh_proj is not None and self.enorm is not None and self.hnorm is not None:
            assert ahead is not None
            hidden = self.eh_proj(torch.cat([self.enorm(ahead), self.hnorm(hidden)], -1))
        x, sides = self.block(hidden, step, views)
        return x if self.norm is None else self.norm(x), sides
