"""What a recipe says under `stages` and `average`. Importable without torch."""

from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from weft.spec import LinearScaling, Llama3Scaling
from weft.spec.base import Spec
from weft.train.settings import BatchSettings, Share


class StageBatch(Spec):
    """What a stage changes of `batch`; None is what the recipe says there."""

    rows: PositiveInt | None = None
    length: PositiveInt | None = None
    micro: PositiveInt | None = None

    def over(self, batch: BatchSettings) -> BatchSettings:
        given = {key: value for key, value in self.model_dump().items() if value is not None}
        micro = {"micro": min(batch.micro, given.get("rows", batch.rows))} if batch.micro is not None else {}
        made = BatchSettings.model_validate({**batch.model_dump(), **micro, **given})
        if made.micro is not None and made.micro > made.rows:
            raise ValueError(f"a stage's micro is {made.micro} but its rows are {made.rows}; a micro-batch is a part of the batch.")
        return made


class RopeChange(Spec):
    """What a stage changes of the rotary positions of every layer; None is as it was."""

    base: PositiveFloat | None = None
    scaling: LinearScaling | Llama3Scaling | None = Field(default=None, discriminator="type")

    def changes(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class StageSettings(Spec):
    """A stretch of a run (The Llama 3 Herd of Models 2024, section 3.4).

    name   for tables.      share  of the run's steps, in proportion to the other stages'.
    batch  rows, length, micro of its batches. Longer rows than the model's context make that longer.
    data   as the recipe's; None is the recipe's. What is held out is always the recipe's.
    rope   changes of rotary positions, from here on; a larger `base` for longer rows.
    final  the learning rate goes straight from where it stands to this share of its peak. Stages with it come last: the run's schedule ends
           where the first of them begins.
    """

    name: str | None = None
    share: PositiveFloat = 1.0
    batch: StageBatch = StageBatch()
    data: str | list[Any] | dict[str, Any] | None = None
    rope: RopeChange | None = None
    final: Share | None = None


class AverageSettings(Spec):
    """A mean of checkpoints at the end of a run, in its folder `average` (Polyak averaging, as Llama 3 does over its last stage).

    count  checkpoints, evenly spread up to the last step; they are kept in `snapshots`. A run that stops early takes those it has by then,
           and its last weights.
    over   share of the run that they are spread over; None is the last stage, or a tenth of a run without stages.
    decay  each weighs so many times the one after it; None weighs all alike.
    """

    count: Annotated[int, Field(ge=2)] = 8
    over: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
