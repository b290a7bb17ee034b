"""LSTM and GRU: gates over a hidden state that is overwritten at every token. Weights lie as in torch.nn.LSTM and GRU."""

import math

import torch
from torch import Tensor, nn

from weft.nn.linear import Linear, affine
from weft.nn.mixer import Side, Site, State, last_valid, register
from weft.nn.step import Step
from weft.spec import GRU as GRUSpec
from weft.spec import LSTM as LSTMSpec
from weft.spec import StateSpec


class _Gated(nn.Module):
    """Parameters and the two ways to run: a loop that resets at position 0, and torch's fused op where nothing resets."""

    gates: int

    def __init__(self, spec: LSTMSpec | GRUSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dim = spec, site.dim
        self.hidden = spec.width(site.dim)
        self.weight_ih = nn.Parameter(torch.empty(self.gates * self.hidden, site.dim))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * self.hidden, self.hidden))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * self.hidden))
        self.bias_hh = nn.Parameter(torch.empty(self.gates * self.hidden))
        self.out = Linear(self.hidden, site.dim, site.residual_std) if self.hidden != site.dim else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh):
            nn.init.uniform_(parameter, -1 / math.sqrt(self.hidden), 1 / math.sqrt(self.hidden))

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("weight_ih", "weight_hh"), (self.hidden,) * self.gates)

    def state_spec(self) -> StateSpec:
        return self.spec.state(self.dim)

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        # The fused op is several times faster but cannot reset inside a row, and the compiler cannot look into it.
        if views is None and step.plain and not torch.compiler.is_compiling():
            trajectory = {"h": self._fused(x)}
        else:
            trajectory = self._loop(x, step, views)
        pending = {} if views is None else {name: last_valid(values, step) for name, values in trajectory.items()}
        y = trajectory["h"]
        return (y if self.out is None else self.out(y)), Side(pending)

    def _loop(self, x: Tensor, step: Step, views: State | None) -> dict[str, Tensor]:
        projected = affine(x, self.weight_ih, self.bias_ih)
        names = list(self.spec.state(self.dim))
        if views is None:
            state = {name: projected.new_zeros(x.shape[0], self.hidden) for name in names}
        else:
            state = {name: views[name].to(projected.dtype) for name in names}
        trajectory: dict[str, list[Tensor]] = {name: [] for name in names}
        for t in range(x.shape[1]):
            fresh = (step.positions[:, t] == 0)[:, None]
            state = {name: value.masked_fill(fresh, 0) for name, value in state.items()}
            state = self._cell(projected[:, t], state)
            for name in names:
                trajectory[name].append(state[name])
        return {name: torch.stack(values, 1) for name, values in trajectory.items()}

    def _weights(self, dtype: torch.dtype) -> list[Tensor]:
        return [parameter.to(dtype) for parameter in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]

    def _fused(self, x: Tensor) -> Tensor:
        raise AssertionError("every gated layer defines _fused")

    def _cell(self, projected: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("every gated layer defines _cell")


@register(LSTMSpec)
class LSTM(_Gated):
    """c = f c + i g, h = o tanh(c) (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000). FIXED state h and c."""

    gates = 4

    def reset_parameters(self) -> None:
        """The forget gate starts open (Jozefowicz et al. 2015)."""
        super().reset_parameters()
        with torch.no_grad():
            self.bias_ih[self.hidden : 2 * self.hidden].fill_(1.0)
            self.bias_hh[self.hidden : 2 * self.hidden].zero_()

    def _cell(self, projected: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        i, f, g, o = (projected + affine(state["h"], self.weight_hh, self.bias_hh)).chunk(4, -1)
        c = f.sigmoid() * state["c"] + i.sigmoid() * g.tanh()
        return {"h": o.sigmoid() * c.tanh(), "c": c}

    def _fused(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, x.shape[0], self.hidden)
        y: Tensor = torch._VF.lstm(x, (zeros, zeros), self._weights(x.dtype), True, 1, 0.0, self.training, False, True)[0]
        return y


@register(GRUSpec)
class GRU(_Gated):
    """h = (1 - z) n + z h with the reset gate after the product (Cho et al. 2014, in the form torch computes). FIXED state h."""

    gates = 3

    def _cell(self, projected: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        reset_x, update_x, new_x = projected.chunk(3, -1)
        reset_h, update_h, new_h = affine(state["h"], self.weight_hh, self.bias_hh).chunk(3, -1)
        update = (update_x + update_h).sigmoid()
        new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
        return {"h": (1 - update) * new + update * state["h"]}

    def _fused(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, x.shape[0], self.hidden)
        y: Tensor = torch._VF.gru(x, zeros, self._weights(x.dtype), True, 1, 0.0, self.training, False, True)[0]
        return y
