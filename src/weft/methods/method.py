"""What a kind of training has to say so that a recipe can become a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from weft.data.prepare import Progress
from weft.nn import Model
from weft.train.job import BatchSource
from weft.train.objective import Objective
from weft.train.parallel import World
from weft.train.plan import Plan
from weft.train.settings import OptimSettings


@dataclass(frozen=True)
class Place:
    """Where a run takes place.

    dtype     of weights.        cache     folder for what data is turned into.
    progress  is told how far raw text has been prepared.
    products  dtype of matrix products, by autocast.
    dropped   why records were left out (`data.drop_bad`), each once, however many stages read it; the run card has their number.
    """

    device: torch.device
    dtype: torch.dtype
    world: World
    cache: Path
    progress: Progress | None = None
    products: torch.dtype = torch.float32
    dropped: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Setup:
    """What a run minimises and with what.

    models  by role, besides the policy: frozen ones, and further trained ones such as a critic.
    engine  what online objectives generate with.
    optims  of a trained role, where it has settings of its own.
    facts   further entries of the run card's `run` section.
    """

    objective: Objective[Any]
    models: Mapping[str, Model] = field(default_factory=dict)
    engine: Any = None
    optims: Mapping[str, OptimSettings] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """One kind of training. The calls come in this order; all but the first may read files and take memory."""

    def check(self, plan: Plan) -> None:
        """Refuse a plan that cannot work, with a UserError, before anything is paid for."""
        ...

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        """This process's batches. Where data has to be prepared for all processes, the leading one is called first."""
        ...

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        """The model that is trained, from the one the recipe names: a classifier puts a head on it."""
        ...

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        """The objective, and all it needs besides policy and batches; `policy` still has the weights it begins with."""
        ...
