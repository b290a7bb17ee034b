"""RWKV's channel mix: a channel layer that looks one token back and so owns state."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.linear import Linear
from weft.nn.mixer import Side, Site, State, last_valid, register
from weft.nn.step import Step
from weft.spec import RWKVChannelMix as RWKVChannelMixSpec
from weft.spec import StateSpec


def token_shift(x: Tensor, step: Step, before: Tensor | None) -> Tensor:
    """The previous token's entry for every token of x [B, T, D]; `before` [B, D] precedes the chunk, zeros precede position 0."""
    first = torch.zeros_like(x[:, :1]) if before is None else before[:, None].to(x.dtype)
    return torch.cat([first, x[:, :-1]], 1) * (step.positions > 0)[..., None]


@register(RWKVChannelMixSpec)
class RWKVChannelMix(nn.Module):
    """sigmoid(R xr) * V relu(K xk)^2, xr and xk blending this token with the one before (Peng et al. 2023, equations 18 to 20)."""

    def __init__(self, spec: RWKVChannelMixSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dim = spec, site.dim
        self.key = Linear(site.dim, spec.hidden, site.init_std)
        self.value = Linear(spec.hidden, site.dim, site.residual_std)
        self.receptance = Linear(site.dim, site.dim, site.init_std)
        self.mix_key = nn.Parameter(torch.empty(site.dim))
        self.mix_receptance = nn.Parameter(torch.empty(site.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Channels start spread from looking mostly back to looking only at this token."""
        for mix in (self.mix_key, self.mix_receptance):
            with torch.no_grad():
                mix.copy_(torch.linspace(0, 1, self.dim, device=mix.device))

    def state_spec(self) -> StateSpec:
        return self.spec.state(self.dim)

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        before = token_shift(x, step, None if views is None else views["shift"])
        key = F.relu(self.key(torch.lerp(before, x, self.mix_key.to(x.dtype)))).square()
        gate = torch.sigmoid(self.receptance(torch.lerp(before, x, self.mix_receptance.to(x.dtype))))
        pending = {} if views is None else {"shift": last_valid(x, step)}
        return gate * self.value(key), Side(pending)
