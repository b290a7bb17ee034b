"""Everything a trainer is given, put together and ready."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from weft.nn import Model
from weft.train.objective import POLICY, Batch, Objective
from weft.train.parallel import World
from weft.train.run_folder import RunFolder
from weft.train.schedule import Schedule
from weft.train.settings import EvalSettings, LogSettings, OptimSettings, SaveSettings
from weft.train.stage_settings import AverageSettings
from weft.train.stages import StagedSchedule, Stages
from weft.weights.save import SavedTokenizer
from weft.zoo import Family


class BatchSource(Protocol):
    """Batches as a pure function of the step; `weft.data.batches.Batches` is one."""

    valid: Any  # None where nothing is held out

    length: int

    @property
    def tokens_per_batch(self) -> int: ...

    def batch(self, step: int) -> Batch: ...

    def validation(self, max_batches: int | None = None) -> Iterator[Batch]: ...

    def report(self, steps: int | None = None) -> list[dict[str, Any]]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Length:
    """How long a run is: steps, or minutes that become steps once the pace is known. Exactly one is given."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        assert (self.steps is None) != (self.minutes is None)


@dataclass(frozen=True)
class Compute:
    """Where and how: device, dtype of the products, torch.compile, recomputation of blocks in the backward pass."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Job:
    """A run.

    models      by role, on the device; those the objective trains and those it only reads.
    batches     this process's share of the data.
    folder      where it writes; held by the leading process, None in the others.
    out         the same folder's path, for all.
    micro       rows of a micro-batch; None takes all rows of a process at once.
    essentials  the settings that decide the result: a run resumes only under the same ones.
    origins     fingerprints of the models it reads, which must stay the same too.
    facts       further entries of the run card's `run` section.
    optim       of every trained role; `optims` overrides it for a role by name (a critic's).
    family      that weights are saved as, where it can hold the model; None takes the first that can.
    engine      what online objectives generate with.
    stages      where batches, positions and the path of the learning rate change in the course of the run.
    average     the mean of checkpoints that is made at its end.
    """

    models: Mapping[str, Model]
    objective: Objective[Any]
    batches: BatchSource
    folder: RunFolder | None
    out: Path
    length: Length
    compute: Compute
    tokenizer: SavedTokenizer | None = None
    family: Family | None = None
    micro: int | None = None
    optim: OptimSettings = field(default_factory=OptimSettings)
    optims: Mapping[str, OptimSettings] = field(default_factory=dict)
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    save: SaveSettings = field(default_factory=SaveSettings)
    log: LogSettings = field(default_factory=LogSettings)
    seed: int = 0
    world: World = field(default_factory=World)
    essentials: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    engine: Any = None
    stages: Stages | None = None
    average: AverageSettings | None = None

    def path(self, settings: OptimSettings) -> Schedule | StagedSchedule:
        """The path of the learning rate over the run."""
        return settings.path() if self.stages is None else self.stages.path(settings.path())

    @property
    def policy(self) -> Model:
        return self.models[POLICY]

    @property
    def trained(self) -> dict[str, Model]:
        """The models that get an optimiser, by role."""
        return {role: self.models[role] for role, facts in self.objective.roles.items() if facts.trained}
