"""A run as data: YAML, with `key=value` overrides from the command line, validated whole before anything is loaded. Without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from weft.errors import UserError, nearest
from weft.files import read_text
from weft.objectives.settings import NextTokenSettings, ObjectiveSettings
from weft.spec.adapters import AdapterSettings
from weft.spec.base import Spec, parse
from weft.spec.quant import FORMATS, Quant
from weft.train.settings import BatchSettings, EvalSettings, LogSettings, OptimSettings, SaveSettings
from weft.train.stage_settings import AverageSettings, StageSettings

# Settings that do not change what is trained: a run may be resumed under others.
_INCIDENTAL = {"out", "save", "log", "device", "compile", "gradient_checkpointing"}


def _format(value: Any) -> Any:
    """`quantize: nf4` for the form that QLoRA has."""
    return FORMATS.get(value, {"type": value}) if isinstance(value, str) else value


class Recipe(Spec):
    """Everything about a run.

    model      a name that `weft models` lists, a YAML or JSON spec, the folder or GGUF file of a model to train further, or a spec
               written out here (its `vocab` may be left to the tokenizer).
    pretrained for a name: begin from the weights that `weft pull` fetched, instead of from scratch.
    adapter    what of the model is trained where not all of it is (see `weft.spec.adapters`): a form's name, or its settings.
    quantize   how the weights beside an adapter are stored (QLoRA): nf4, int8, int4, or a form in full (see `weft.spec.quant`).
    data       a path, a list of paths, a list of `{path, weight, name}`, or a mapping (see `weft.data.load.DataSpec`).
    out        the folder of the run.
    tokenizer  a file or folder; None takes the one beside the model, else the one that the data was prepared with.
    steps      optimiser steps, or instead
    minutes    of training: compilation, evaluation at the start and saving apart.
    seed       of initial weights, data order and dropout.
    stages     stretches with batches, data and positions of their own (see `weft.train.stage_settings`).
    average    the mean of checkpoints to make at the end.
    dtype      of the matrix products, by autocast; weights and optimiser stay in float32. `auto` is bfloat16 (float32 on mps).
    compile    run the model and the loss through torch.compile.
    gradient_checkpointing  recompute each block in the backward pass: less memory, a third more work.
    deterministic  take only kernels that give the same bits each time; needed for exact resume on a GPU.
    """

    model: str | dict[str, Any]
    data: str | list[Any] | dict[str, Any]
    out: str
    pretrained: bool = False
    adapter: AdapterSettings | None = None
    quantize: Annotated[Quant | None, BeforeValidator(_format)] = None
    tokenizer: str | None = None
    steps: PositiveInt | None = None
    minutes: PositiveFloat | None = None
    seed: NonNegativeInt = 0
    objective: ObjectiveSettings = NextTokenSettings()
    batch: BatchSettings = BatchSettings()
    optim: OptimSettings = OptimSettings()
    stages: tuple[StageSettings, ...] | None = None
    average: AverageSettings | None = None
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    deterministic: bool = True

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        if self.steps is None and self.minutes is None:
            raise ValueError("neither steps nor minutes is given, so the run would have no end; give one of the two.")
        if self.steps is not None and self.minutes is not None:
            raise ValueError(f"steps is {self.steps} and minutes {self.minutes:g}; a run has one length: drop one of the two.")
        answers = self.batch.rows * getattr(self.objective, "samples", 1)  # online objectives cut answers, not prompts
        if self.batch.micro is not None and self.batch.micro > answers:
            raise ValueError(f"batch.micro is {self.batch.micro} but batch.rows {self.batch.rows}; a micro-batch is a part of the batch.")
        if self.pretrained and isinstance(self.model, dict):
            raise ValueError("pretrained is true but model is a spec, which has no weights; give the name or folder of a model.")
        if self.quantize is not None and (self.adapter is None or self.adapter.whole):
            given = "there is no adapter" if self.adapter is None else f"adapter is {self.adapter.type}"
            raise ValueError(
                f"quantize is {self.quantize.type} but {given}, and weights in few bits cannot be trained themselves; give adapter=lora."
            )
        if self.average is not None and self.adapter is not None and not self.adapter.whole:
            raise ValueError(
                "average is given with an adapter, whose factors mean nothing when they are averaged apart; drop one of the two."
            )
        return self

    @model_validator(mode="after")
    def _stages_possible(self) -> "Recipe":
        if not self.stages:
            return self
        if self.steps is None:
            raise ValueError("stages share out a number of steps, but the run has minutes; give steps instead.")
        if self.steps < len(self.stages):
            raise ValueError(f"steps is {self.steps} but there are {len(self.stages)} stages; give each a step at least.")
        ends = [stage.final is not None for stage in self.stages]
        if ends != sorted(ends):
            raise ValueError(
                "a stage without `final` comes after one that has it; the run's schedule cannot go on after its end: give both."
            )
        for stage in self.stages:
            stage.batch.over(self.batch)
        return self

    def essentials(self) -> dict[str, Any]:
        """The settings that decide what is trained, JSON-ready."""
        return self.model_dump(mode="json", exclude=_INCIDENTAL)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `optim.lr=3e-4`; raises UserError with one sentence for anything wrong in it."""
    path = Path(path)
    try:
        data = yaml.safe_load(read_text(path, "recipe"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a recipe; write keys with values, such as `model: smollm2-135m`.")
    return recipe(override(data, overrides), str(path))


def recipe(data: Mapping[str, Any], what: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; raises UserError."""
    for key in ("model", "data", "out"):
        if data.get(key) is None:
            raise UserError(f"{what}: no {key} is given; add `{key}: …` to the recipe, or {key}=… to the command.")
    parsed: Recipe = parse(Recipe, dict(data), what)
    return parsed


def override(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with `dotted.key=value` applied in order, values read as YAML.

    Giving `minutes` takes away a `steps` that the recipe had, and the other way round. Raises UserError for what is no assignment,
    and for a dotted key that leads through something other than a mapping.
    """
    result = dict(data)
    keys = [_assign(result, assignment) for assignment in overrides]
    for given, other in (("minutes", "steps"), ("steps", "minutes")):
        if given in keys and other not in keys and result.get(given) is not None:
            result.pop(other, None)
    return result


def _assign(data: dict[str, Any], assignment: str) -> str:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"'{assignment}' is not an assignment; write key=value, such as optim.lr=3e-4.{nearest(key, Recipe.model_fields)}")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    *path, last = key.split(".")
    place: Any = data
    for depth, part in enumerate(path, 1):
        at = _index(place, part, key)
        inner = place[at] if isinstance(place, list) else place.get(at)
        if inner is not None and not isinstance(inner, dict | list):
            raise UserError(f"{key} cannot be set: {'.'.join(path[:depth])} is {inner!r}, which has no keys; set it as a whole.")
        place[at] = list(inner) if isinstance(inner, list) else dict(inner or {})
        place = place[at]
    place[_index(place, last, key)] = value
    return key


def _index(place: Any, part: str, key: str) -> Any:
    """A part of a dotted key as what it leads into wants it: a number, counted from 0, in a list."""
    if not isinstance(place, list):
        return part
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"{key} cannot be set: there is a list of {len(place)}, whose entries are 0 to {len(place) - 1}, and not {part}.")
    return int(part)
