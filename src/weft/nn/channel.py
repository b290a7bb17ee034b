"""Channel mixing without state: the MLP of the Transformer and its gated forms."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from weft import kernels
from weft.nn.linear import Linear
from weft.nn.mixer import Side, Site, State, register
from weft.nn.packed import PackedWeight, multiply_gated
from weft.nn.step import Step
from weft.spec import MLP as MLPSpec
from weft.spec import Gated as GatedSpec
from weft.spec import StateSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


@register(MLPSpec)
class MLP(nn.Module):
    """down(activation(up(x))) (Vaswani et al. 2017, equation 2)."""

    def __init__(self, spec: MLPSpec, site: Site) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.up = Linear(site.dim, spec.hidden, site.init_std, spec.bias)
        self.down = Linear(spec.hidden, site.dim, site.residual_std, spec.bias)

    def state_spec(self) -> StateSpec:
        return {}

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        return self.down(self.activation(self.up(x))), Side()


@register(GatedSpec)
class Gated(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, equation 6); `gate_up` holds the gate's rows first."""

    def __init__(self, spec: GatedSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        self.gate_up = Linear(site.dim, 2 * spec.hidden, site.init_std, spec.bias)
        self.down = Linear(spec.hidden, site.dim, site.residual_std, spec.bias)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"gate_up.weight": (self.down.in_features, self.down.in_features)}

    def state_spec(self) -> StateSpec:
        return {}

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        if self.spec.activation == "silu" and kernels.usable(x):
            plain = not self.spec.bias and self.gate_up.adapter is None and self.down.adapter is None
            if plain and isinstance(self.gate_up.weight, PackedWeight) and isinstance(self.down.weight, PackedWeight):
                return multiply_gated(x, self.gate_up.weight, self.down.weight), Side()
            return self.down(kernels.ops.silu_gate(self.gate_up(x))), Side()
        both = self.gate_up(x)
        gate, up = both.chunk(2, -1)
        return self.down(self.activation(gate) * up), Side()
