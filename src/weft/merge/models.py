"""Model folders into one: checked to be of one kind, read tensor by tensor in float32, written as a folder in Hugging Face layout."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from weft.data.encoder import fingerprint
from weft.errors import UserError
from weft.files import atomic_folder
from weft.merge import combine
from weft.nn import build
from weft.spec import ModelSpec
from weft.tokenizer import Tokenizer
from weft.weights.export import bring_tokenizer
from weft.weights.fidelity import tokenizer_of
from weft.weights.files import write_safetensors
from weft.weights.load import Checkpoint, open_checkpoint, stored_dtype
from weft.weights.map import TensorReader, identity_rules, split, stored_state, stored_tensors
from weft.weights.save import check_replaceable, write_config
from weft.zoo import rules_of
from weft.zoo.family import canonical
from weft.zoo.rules import Alias, Drop

SHARD = 1e9  # bytes of a file of weights: what is held at a time while one is written
Rule = Callable[[Sequence[Tensor]], Tensor]
"""Tensors of the same name, one a model, into one; float32, or float64 where the models are."""


@dataclass(frozen=True)
class Merged:
    """A model that was written: its folder, how it was made, of what, and how far it lies from each of them: the norm of the difference of
    all weights, relative to the norm of the model's."""

    path: str
    method: str
    models: tuple[str, ...]
    parameters: int
    dtype: str
    distances: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Models:
    """Models of one spec and one tokenizer, opened and compared; their weights are read one tensor at a time.

    Raises UserError naming the first difference where they are not, and for weights in fewer bits.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.checkpoints = [open_checkpoint(path) for path in paths]
        first = self.checkpoints[0]
        for given, checkpoint in zip(paths, self.checkpoints, strict=True):
            if checkpoint.adapter is not None:
                raise UserError(
                    f"{given} is an adapter, whose factors mean nothing apart; `weft merge adapter {given}` makes a model of it first."
                )
            if checkpoint.spec.quant is not None:
                raise UserError(f"{given} is quantised to {checkpoint.spec.quant.type}; merge the models that were quantised instead.")
            if difference := first_difference(canonical(first.spec), canonical(checkpoint.spec)):
                where, one, other = difference
                raise UserError(
                    f"{first.path} and {checkpoint.path} are different models: {where} is {one} in the one and {other} in the other. "
                    "Merge models that were trained from the same one."
                )
        self.tokenizer = _one_tokenizer(self.checkpoints)
        self.dtype = torch.float64 if any(stored_dtype(each) == torch.float64 for each in self.checkpoints) else torch.float32
        model = build(first.spec, "meta", self.dtype)
        self.shapes = stored_state(model)
        self._identity = identity_rules(model)
        self.readers = []
        for each in self.checkpoints:
            prefix = "" if each.is_gguf else each.family.prefix
            self.readers.append(TensorReader(self.shapes, each.rules(model), each.files, prefix, str(each.path)))

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoints[0].spec

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(str(each.path) for each in self.checkpoints)

    def changes(self, index: int) -> Iterator[Tensor]:
        """What one model differs from the first by, tensor by tensor."""
        for name in self.shapes:
            yield self.readers[index].read(name) - self.readers[0].read(name)

    def write(self, rule: Rule, method: str, out: Path, dtype: torch.dtype | None = None) -> Merged:
        """Write what `rule` makes of the models, under the names and with the tokenizer of the first; `dtype` None is that it is stored in.

        The rule sees tensors as files have them: queries, keys and values apart. Raises UserError for a folder that holds something else,
        and where a merged number is not finite.
        """
        check_replaceable(out)
        first = self.checkpoints[0]
        stored = dtype or stored_dtype(first)
        squares = torch.zeros(2, len(self.readers), dtype=torch.float64)
        with atomic_folder(out) as partial:
            family = write_config(self.spec, partial, stored, self.tokenizer, first.family)
            rules = rules_of(family, self.spec) or self._identity
            write_safetensors(partial, self._merged(rule, rules, stored, squares), SHARD, dtype=stored)
            bring_tokenizer(first, partial)
        distances = [math.sqrt(float(off / max(float(own), 1e-300))) for off, own in zip(*squares, strict=True)]
        name = str(stored).removeprefix("torch.")
        return Merged(str(out), method, self.paths, self.spec.num_params(), name, tuple(distances))

    @torch.no_grad()
    def _merged(self, rule: Rule, rules: Sequence[Any], dtype: torch.dtype, squares: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Merged tensors by their names in the file; `squares` is given the sums of squares of differences and of weights."""
        second = {row.of: row.name for row in rules if isinstance(row, Alias) and row.written}
        for row in rules:
            if isinstance(row, Drop | Alias):
                continue
            given = [reader.read(row.ours) for reader in self.readers]
            made = torch.empty_like(given[0])
            for place, *parts in zip(split(row, made), *(split(row, tensor) for tensor in given), strict=True):
                place.copy_(rule(parts))
            if not made.isfinite().all():
                raise UserError(f"{row.ours} is not finite once merged; look for a model among {', '.join(self.paths)} that is damaged.")
            for index, tensor in enumerate(given):
                squares[0, index] += (made - tensor).double().square().sum()
                squares[1, index] += tensor.double().square().sum()
            for name, tensor in stored_tensors({row.ours: made}, [row]):
                kept = tensor.to(dtype)
                yield name, kept
                if name in second:
                    yield second[name], kept


def average(models: Models, weights: Sequence[float], out: Path, method: str = "average", dtype: torch.dtype | None = None) -> Merged:
    """The weighted mean; weights are scaled to a sum of 1."""
    if not len(weights) == len(models.readers):
        raise UserError(f"{len(weights)} weights are given for {len(models.readers)} models; give one each.")
    if not all(map(math.isfinite, weights)) or sum(weights) <= 0:
        raise UserError(f"the weights are {', '.join(f'{weight:g}' for weight in weights)}; their sum must be above 0.")
    shares = combine.shares(weights)
    return models.write(lambda tensors: combine.linear(tensors, shares), method, out, dtype)


def interpolate(models: Models, t: float, out: Path, dtype: torch.dtype | None = None) -> Merged:
    """SLERP from the first of two models to the second."""
    if len(models.readers) != 2:
        raise UserError(f"slerp goes from one model to another, but {len(models.readers)} are given; give two.")
    if not 0 <= t <= 1:
        raise UserError(f"t is {t:g}; give a share from 0 (the first model) to 1 (the second).")
    return models.write(lambda tensors: combine.slerp(tensors[0], tensors[1], t), "slerp", out, dtype)


def agree(models: Models, density: float, scale: float, weights: Sequence[float], out: Path, dtype: torch.dtype | None = None) -> Merged:
    """TIES: the first model is the base, the others were trained from it. `density` of each one's changes are kept, the largest in the
    whole model."""
    tasks = len(models.readers) - 1
    if tasks < 1:
        raise UserError("ties needs the base model and at least one that was trained from it; give two models or more.")
    if not 0 < density <= 1:
        raise UserError(f"density is {density:g}; give the share of changes to keep, above 0 and at most 1.")
    weights = list(weights) or [1.0] * tasks
    if len(weights) != tasks or not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"{len(weights)} weights are given for {tasks} models beside the base; give each one above 0.")
    thresholds = [combine.magnitude(partial(models.changes, index), density) for index in range(1, tasks + 1)]
    return models.write(lambda tensors: combine.ties(tensors[0], tensors[1:], thresholds, weights, scale), "ties", out, dtype)


def first_difference(one: Any, other: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The innermost place at which two descriptions differ, with both values; None where they are equal."""
    one, other = (each.model_dump() if isinstance(each, BaseModel) else each for each in (one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = {str(key): (one.get(key), other.get(key)) for key in {**one, **other}}
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = {str(index): pair for index, pair in enumerate(zip(one, other, strict=True))}
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return f"the number of {where}", len(one), len(other)
    else:
        return None if one == other else (where, one, other)
    for key, (mine, given) in pairs.items():
        if found := first_difference(mine, given, f"{where}.{key}" if where else key):
            return found
    return None


def _one_tokenizer(checkpoints: Sequence[Checkpoint]) -> Tokenizer | None:
    """The tokenizer of the first; raises UserError where another model has another one."""
    first: Tokenizer | None = None
    for checkpoint in checkpoints:
        own = tokenizer_of(checkpoint.path)
        if own is None:
            continue
        if first is not None and fingerprint(own) != fingerprint(first):
            raise UserError(
                f"{checkpoint.path} has another tokenizer than {checkpoints[0].path}; merge models that read text in the same ids."
            )
        first = first or own
    return first
