"""A mixture of experts: a router, gated units side by side, and those that every token passes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.nn.channel import ACTIVATIONS, Gated
from weft.nn.fill import fill_normal
from weft.nn.grouped import Assignment, grouped_linear, grouped_packed_linear
from weft.nn.mixer import Side, Site, State, register
from weft.nn.packed import PackedWeight
from weft.nn.precision import working_dtype
from weft.nn.router import Router, losses, statistics, within_capacity
from weft.nn.step import Step
from weft.spec import Experts as ExpertsSpec
from weft.spec import Gated as GatedSpec
from weft.spec import StateSpec


class Units(nn.Module):
    """E gated units: `gate_up` [E, 2 hidden, D], the gate's rows first, and `down` [E, D, hidden]."""

    stacked = ("gate_up", "down")

    def __init__(self, spec: ExpertsSpec, site: Site) -> None:
        super().__init__()
        self.activation, self.stds = ACTIVATIONS[spec.activation], (site.init_std, site.residual_std)
        self.gate_up = nn.Parameter(torch.empty(spec.experts, 2 * spec.hidden, site.dim))
        self.down = nn.Parameter(torch.empty(spec.experts, site.dim, spec.hidden))

    def reset_parameters(self) -> None:
        for weight, std in zip((self.gate_up, self.down), self.stds, strict=True):
            if isinstance(weight, Tensor):
                fill_normal(weight, std)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        experts, dim, hidden = self.down.shape
        return {"gate_up": (hidden,) * (2 * experts), "down": (dim,) * experts}

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [M, D] sorted by expert, `ends` [E] -> [M, D], each through its own unit."""
        gate, up = _multiply(rows, self.gate_up, ends).chunk(2, -1)
        return _multiply(self.activation(gate) * up, self.down, ends)


@register(ExpertsSpec)
class Experts(nn.Module):
    """sum over the chosen e of weight_e * unit_e(x), plus the shared unit (DeepSeekMoE, Dai et al. 2024, equations 9 to 11).

    aux of a parallel pass: the router's `statistics`, `dropped` choices where there is a capacity, and in training the losses that the
    spec gives a weight, unweighted. A pass over state hands out nothing.
    """

    def __init__(self, spec: ExpertsSpec, site: Site) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(spec, site.dim, site.init_std)
        self.units = Units(spec, site)
        shared = GatedSpec(hidden=spec.shared_hidden, activation=spec.activation) if spec.shared else None
        self.shared = None if shared is None else Gated(shared, site)

    def state_spec(self) -> StateSpec:
        return {}

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        tokens, valid = x.flatten(0, 1), step.valid.flatten()
        routing = self.router(tokens)
        weights, aux = routing.weights, {}
        if views is None:
            aux = statistics(routing, valid)
            if self.training:
                aux |= losses(routing, step.valid, self.spec)
                if self.spec.capacity is not None:
                    kept = within_capacity(routing.chosen, valid, self.spec)
                    weights = weights * kept
                    aux["dropped"] = (~kept & valid[:, None]).sum().to(weights.dtype)
        assignment = Assignment(routing.chosen, valid, self.spec.experts)
        y = assignment.combine(self.units(assignment.dispatch(tokens), assignment.ends), weights).to(x.dtype).view_as(x)
        return y if self.shared is None else y + self.shared(x, step)[0], Side(aux=aux)

    @torch.no_grad()
    def after_step(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move the choice bias by the tokens that each expert had.

        Returns the least and the largest share of an expert as multiples of the fair one, the mean entropy of a token's shares in nats, and
        the share of choices that found no room.
        """
        chosen = stats["chosen"]
        self.router.move_bias(chosen)
        total = chosen.sum().clamp(min=1)
        shares = chosen * (self.spec.experts / total)
        said = {"expert_share_min": shares.amin(), "expert_share_max": shares.amax()}
        said["router_entropy"] = (stats["entropy"] / stats["tokens"].clamp(min=1)).sum()
        if "dropped" in stats:
            said["experts_dropped"] = (stats["dropped"] / total).sum()
        return said


def naive_experts(module: Experts, x: Tensor) -> Tensor:
    """The definition, token by token and expert by expert, without capacity: x [N, D] -> [N, D]; the twin of `Experts`."""
    routing, units = module.router(x), module.units
    rows = []
    for token, chosen, weights in zip(x, routing.chosen.tolist(), routing.weights, strict=True):
        y = torch.zeros_like(token)
        for e, weight in zip(chosen, weights, strict=True):
            gate, up = (units.gate_up[e] @ token).chunk(2)
            y = y + weight * (units.down[e] @ (units.activation(gate) * up))
        if module.shared is not None:
            gate, up = (module.shared.gate_up.weight @ token).chunk(2)
            y = y + module.shared.down.weight @ (module.shared.activation(gate) * up)
        rows.append(y)
    return torch.stack(rows)


def _multiply(rows: Tensor, weight: Tensor | PackedWeight, ends: Tensor) -> Tensor:
    """A grouped product, in autocast's dtype where it is on."""
    if isinstance(weight, PackedWeight):
        return grouped_packed_linear(rows, weight, ends)
    narrow = working_dtype(rows)
    return grouped_linear(rows.to(narrow), weight.to(narrow), ends)
