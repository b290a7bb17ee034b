"""The settings of a run, section by section. Importable without torch."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from weft.spec.base import Spec
from weft.train.schedule import Schedule, Shape

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Below1 = Annotated[float, Field(ge=0.0, lt=1.0)]


class BatchSettings(Spec):
    """One optimiser step's data.

    rows    of the global batch, over all ranks and micro-batches.
    length  tokens a row; None takes the model's context.
    micro   rows a forward pass of one rank; None takes all at once. The gradient does not depend on it.
    """

    rows: PositiveInt = 16
    length: PositiveInt | None = None
    micro: PositiveInt | None = None


class OptimSettings(Spec):
    """The optimiser and the path of its learning rate.

    name          "adamw" (Loshchilov and Hutter 2019), or "muon": matrices inside blocks by Muon, the rest and adapters by AdamW.
    lr            peak learning rate.
    matrix_lr     peak of the matrices that Muon moves; None is `lr`.
    weight_decay  of matrices, an untied head and an adapter's factors; embeddings, norms, biases and other vectors have none.
    clip          largest norm of all gradients together (Pascanu et al. 2013); None clips nothing.
    schedule, warmup, final, decay: see `Schedule`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 1e-3
    matrix_lr: PositiveFloat | None = None
    betas: tuple[Below1, Below1] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    momentum: Below1 = 0.95
    clip: PositiveFloat | None = 1.0
    schedule: Shape = "cosine"
    warmup: NonNegativeInt | None = None
    final: Share = 0.1
    decay: Share = 0.2

    @model_validator(mode="after")
    def _consistent(self) -> "OptimSettings":
        if self.matrix_lr is not None and self.name != "muon":
            raise ValueError(
                f"matrix_lr is {self.matrix_lr} but name is {self.name}; only muon has matrices of its own: drop one of the two."
            )
        return self

    def path(self) -> Schedule:
        return Schedule(self.schedule, self.warmup, self.final, self.decay)


class EvalSettings(Spec):
    """When the held-out data is looked at. It is always at the start and at the end.

    every     steps between evaluations; None is a tenth of the run.
    batches   at most this many batches of `batch.rows` rows; None covers all held-out data.
    patience  evaluations without a new best loss after which training stops; None never stops early.
    """

    every: PositiveInt | None = None
    batches: PositiveInt | None = 8
    patience: PositiveInt | None = None


class SaveSettings(Spec):
    """When `last` is written: every so many steps, every so many minutes, or both. It is always at the start and at the end."""

    every: PositiveInt | None = None
    minutes: PositiveFloat | None = 5.0


class LogSettings(Spec):
    """every: steps between two progress lines; None is about one a second. Every step has its row in metrics.jsonl in any case."""

    every: PositiveInt | None = None
    tensorboard: bool = False
    plot: bool = True
