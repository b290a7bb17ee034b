"""The one interface of everything that mixes: training, prefill, decode and verification are the same call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from weft.spec import Spec, StateSpec
from weft.spec.model import Dropout

State = Mapping[str, Any]
"""What a mixer sees of its state: views for append and ring leaves, tensors [B, *shape] for fixed and static ones."""


class Side:
    """What a layer produces besides `y`. A plain class, so that nothing casts the floats inside.

    pending  FIXED state after this pass, [B, T', *shape] a leaf: one entry a token, or T' = 1 for the last valid token only.
             It takes effect in `Arena.commit` alone. A mixer with a `commit` of its own may put other tensors here.
    aux      named tensors for objectives and metrics; they travel to `Output.aux`.
    """

    def __init__(self, pending: dict[str, Tensor] | None = None, aux: dict[str, Tensor] | None = None) -> None:
        self.pending = pending or {}
        self.aux = aux or {}


class Mixer(Protocol):
    """A layer that mixes along the sequence (or along channels: they share the interface).

    `forward(x, step, views)` takes x [B, T, D] and returns (y [B, T, D], Side). `views` None is the parallel training pass; with
    views the same method is prefill (large T), decode (T = 1) and verification (T = k + 1). It never changes FIXED leaves.

    Optional: `commit(views, pending, accepted)` -> new FIXED leaves, pure, for state that is replayed rather than stored;
    `prime(memory, lengths)` -> STATIC leaves; `after_step(stats)` -> scalars by name, for buffers that move after an optimiser step: its
    own aux summed over the step, and what is said of it in turn.
    `fused_rows()` -> {parameter: rows}: which of its parameters hold several matrices one below the other, and the rows of each.
    """

    def state_spec(self) -> StateSpec | None: ...

    def __call__(self, x: Tensor, step: Any, views: State | None = None) -> tuple[Tensor, Side]: ...


@dataclass(frozen=True)
class Site:
    """Where a part is built: what it needs to know about the model around it.

    residual_std  standard deviation of initial weights that write into the residual stream: smaller in deep models (GPT-2).
    """

    dim: int
    norm: Spec
    dropout: Dropout
    init_std: float
    residual_std: float


M = TypeVar("M", bound=type[nn.Module])
_BUILDERS: dict[type[Spec], Callable[[Any, Site], nn.Module]] = {}


def register(spec_class: type[Spec]) -> Callable[[M], M]:
    """Class decorator: this module computes that spec. The constructor takes (spec, site)."""

    def decorate(module: M) -> M:
        _BUILDERS[spec_class] = cast(Callable[[Any, Site], nn.Module], module)
        return module

    return decorate


def registered() -> list[type[Spec]]:
    """Every spec class that has a module."""
    return list(_BUILDERS)


def build_part(spec: Spec, site: Site) -> nn.Module:
    return _BUILDERS[type(spec)](spec, site)


def last_valid(trajectory: Tensor, step: Any) -> Tensor:
    """Keep what `step.keep` asks for of a state trajectory [B, T, *]: all of it, or the last valid entry as [B, 1, *]."""
    if step.keep == "all" or trajectory.shape[1] == 1:
        return trajectory
    rows = torch.arange(trajectory.shape[0], device=trajectory.device)
    return trajectory[rows, (step.n_new - 1).clamp(min=0)][:, None]
