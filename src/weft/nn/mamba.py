"""Mamba: a diagonal state space whose step size, input and output maps depend on the token."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.linear import Linear
from weft.nn.mixer import Side, Site, State, last_valid, register
from weft.nn.scan import linear_scan
from weft.nn.step import Step
from weft.spec import Mamba as MambaSpec
from weft.spec import StateSpec


@register(MambaSpec)
class Mamba(nn.Module):
    """Selective scan (Gu and Dao 2023, algorithm 2): h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t.

    FIXED state: `conv`, the last taps - 1 inputs of the convolution, and `h` [inner, state_dim] in float32. For verification the
    state is not stored a token, which would cost inner * state_dim numbers each; `commit` replays it from the scan's small inputs.
    """

    def __init__(self, spec: MambaSpec, site: Site) -> None:
        super().__init__()
        self.spec, self.dim = spec, site.dim
        self.inner, self.rank = spec.inner(site.dim), spec.rank(site.dim)
        self.in_proj = Linear(site.dim, 2 * self.inner, site.init_std, spec.bias)
        self.conv = _Taps(self.inner, spec.conv, spec.conv_bias)
        self.x_proj = Linear(self.inner, self.rank + 2 * spec.state_dim, site.init_std)
        self.dt_proj = _StepSize(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, spec.state_dim))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = Linear(self.inner, site.dim, site.residual_std, spec.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -(1, 2, ..., N) a channel (the S4D-real start) and D = 1."""
        if self.A_log.is_meta:
            return
        with torch.no_grad():
            decay = torch.arange(1, self.spec.state_dim + 1, device=self.A_log.device, dtype=torch.float32)
            self.A_log.copy_(decay.log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"in_proj.weight": (self.inner, self.inner), "x_proj.weight": (self.rank, self.spec.state_dim, self.spec.state_dim)}

    def state_spec(self) -> StateSpec:
        return self.spec.state(self.dim)

    def forward(self, x: Tensor, step: Step, views: State | None = None) -> tuple[Tensor, Side]:
        u, gate = self.in_proj(x).chunk(2, -1)
        tail = u.new_zeros(u.shape[0], self.spec.conv - 1, self.inner) if views is None else views["conv"].to(u.dtype)
        taps = torch.cat([tail, u], 1)
        c = F.silu(self.conv(taps, step))
        low, b, read = self.x_proj(c).split([self.rank, self.spec.state_dim, self.spec.state_dim], -1)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        dt = self._step_sizes(self.dt_proj(low).to(wide), views is None)
        inputs = {"dt": dt, "c": c.to(wide), "b": b.to(wide), "fresh": step.positions == 0}
        before = dt.new_zeros(x.shape[0], self.inner, self.spec.state_dim) if views is None else views["h"].to(wide)
        h = self._states(inputs, before)
        y = self._read(h, read.to(wide), views is None) + inputs["c"] * self.D.to(wide)
        y = self.out_proj(y.to(x.dtype) * F.silu(gate))
        if views is None:
            return y, Side()
        if step.keep == "all" and step.length > 1:
            return y, Side({**inputs, "taps": taps})
        tails = taps.unfold(1, self.spec.conv - 1, 1)[:, 1:].transpose(-1, -2)
        return y, Side({"h": last_valid(h, step), "conv": last_valid(tails, step)})

    def commit(self, views: State, pending: dict[str, Tensor], accepted: Tensor) -> dict[str, Tensor]:
        """State after the first `accepted` [B] tokens: beyond them the recurrence is frozen with decay 1 and input 0."""
        rows = torch.arange(accepted.shape[0], device=accepted.device)
        if "h" in pending:
            last = (accepted - 1).clamp(min=0)
            return {name: values[rows, last.clamp(max=values.shape[1] - 1)] for name, values in pending.items()}
        live = torch.arange(pending["dt"].shape[1], device=accepted.device) < accepted[:, None]
        h = self._states(pending, views["h"].to(pending["dt"].dtype), live)
        tail = accepted[:, None] + torch.arange(self.spec.conv - 1, device=accepted.device)
        return {"h": h[:, -1], "conv": pending["taps"][rows[:, None], tail]}

    def _step_sizes(self, x: Tensor, parallel: bool) -> Tensor:
        """softplus. Torch's own rounds the end of a tensor otherwise than the rest; the operations here give a value the same bits wherever
        it lies, but have the wrong gradient at 0."""
        return F.softplus(x) if parallel else x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))

    def _read(self, h: Tensor, read: Tensor, parallel: bool) -> Tensor:
        """C_t h_t, [B, T, inner]. Training saves memory with a batched product, whose sums differ in the last bit with the batch."""
        return torch.einsum("btin,btn->bti", h, read) if parallel else (h * read[:, :, None]).sum(-1)

    def _states(self, inputs: dict[str, Tensor], before: Tensor, live: Tensor | None = None) -> Tensor:
        """Every state [B, T, inner, state_dim] of the discretised recurrence (Gu and Dao 2023, equation 4, with Euler's B)."""
        dt = inputs["dt"]
        decay = torch.exp(dt[..., None] * -torch.exp(self.A_log.to(dt.dtype)))
        decay = decay.masked_fill(inputs["fresh"][..., None, None], 0.0)
        drive = (dt * inputs["c"])[..., None] * inputs["b"][:, :, None]
        if live is not None:
            live = live[..., None, None]
            decay, drive = decay.masked_fill(~live, 1.0), drive.masked_fill(~live, 0.0)
        return linear_scan(decay, drive, before)


class _Taps(nn.Module):
    """Causal depthwise convolution as a sum of shifted copies; a tap never reaches back across position 0."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, extended: Tensor, step: Step) -> Tensor:
        """extended [B, taps - 1 + T, C] begins with the entries before the chunk; returns [B, T, C]."""
        taps, length = self.weight.shape[1], step.length
        weight = self.weight.to(extended.dtype)
        y = extended[:, taps - 1 :] * weight[:, taps - 1]
        for tap in range(taps - 1):
            reach = taps - 1 - tap
            y = y + extended[:, tap : tap + length] * weight[:, tap] * (step.positions >= reach)[..., None]
        return y if self.bias is None else y + self.bias.to(extended.dtype)


class _StepSize(Linear):
    """The projection to step sizes; its bias makes softplus start log-uniform between 0.001 and 0.1 (Gu and Dao 2023, section 3.6)."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__(rank, channels, rank**-0.5, bias=True)

    def reset_parameters(self) -> None:
        if self.weight.is_meta:
            return
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        with torch.no_grad():
            spread = torch.rand(self.out_features, device=self.bias.device)
            dt = torch.exp(spread * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
            self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
