"""Self-attention with alpha-entmax in place of softmax."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.nn.attention import Attention
from weft.nn.entmax import Alpha, attend_entmax
from weft.nn.mixer import Side, Site, State, register
from weft.nn.step import Step
from weft.spec import EntmaxAttention as EntmaxAttentionSpec


@register(EntmaxAttentionSpec)
class EntmaxAttention(Attention):
    """Queries, keys, values and state are those of `Attention`; the weights alone differ (Correia et al. 2019).

    A parallel pass reports `zeros` [H] in `Side.aux`, how many of the keys that queries might see got no weight at all, and `pairs` [],
    how many there were, both float32; training shows the shares.
    """

    def __init__(self, spec: EntmaxAttentionSpec, site: Site) -> None:
        super().__init__(spec.softmax(), site)
        self.start = spec.alpha
        self.alpha_logit = nn.Parameter(torch.empty(self.heads)) if spec.learn_alpha else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.alpha_logit is not None:
            nn.init.constant_(self.alpha_logit, math.log((self.start - 1) / (2 - self.start)))

    @property
    def alpha(self) -> Alpha:
        """The number, or where it is learned [H] in float32 or wider (section 3.2)."""
        if self.alpha_logit is None:
            return self.start
        wide = self.alpha_logit if self.alpha_logit.dtype == torch.float64 else self.alpha_logit.float()
        return 1 + wide.sigmoid()

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        batch, length, _ = x.shape
        q, k, v = self._turned(self.qkv(x).view(batch, length, -1, self.width), step)
        if views is None:
            mask = self._parallel_mask(step)
        else:
            k, v, mask = self._remembered(k, v, step, views)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend_entmax(q, k, v, mask, self.scale, self.alpha, dropout)
        side = Side(aux=_zeros(weights, mask, step)) if views is None else Side()
        return self.out(mixed.reshape(batch, length, -1)), side

    @torch.no_grad()
    def after_step(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The share of exact zeros among what queries might see: of all heads, and of the heads with the least and the most. Where alphas
        are learned, the same of them."""
        shares = stats["zeros"] / stats["pairs"].clamp(min=1)
        said = {"zeros": shares.mean(), "zeros_min": shares.amin(), "zeros_max": shares.amax()}
        if isinstance(alpha := self.alpha, Tensor):
            said |= {"alpha": alpha.mean(), "alpha_min": alpha.amin(), "alpha_max": alpha.amax()}
        return said


@torch.no_grad()
def _zeros(weights: Tensor, mask: Tensor, step: Step) -> dict[str, Tensor]:
    """Exact zeros a head among weights [B, H, T, K] that the mask [B, T, K] and padding leave."""
    seen = mask & step.valid[:, :, None]
    return {"zeros": ((weights == 0) & seen[:, None]).sum((0, 2, 3)).float(), "pairs": seen.sum().float()}
