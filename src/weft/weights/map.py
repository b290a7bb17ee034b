"""Reads a family's weight map both ways: the tensors of a file into a model, and a model's into names and layouts of a file.

Loading streams: each stored tensor is read straight into its place inside one of our parameters, so that memory beyond the model stays
small. Coverage is checked both ways before anything is read: every stored tensor has a row, every parameter is filled, every shape fits.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from weft.errors import UserError, nearest
from weft.zoo.rules import Alias, Cat, Copy, Drop, Interleave, One, Reshape, Rule, Source, Stack, Transpose


class TensorSource(Protocol):
    """A file of named tensors: a folder of safetensors or a GGUF file."""

    @property
    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor: ...

    def read_into(self, name: str, out: Tensor) -> None: ...


def identity_rules(model: nn.Module) -> list[Rule]:
    """The map of a file under our own names."""
    return [One(name, Copy(name)) for name in stored_state(model)]


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """What a file of the model holds, by our names: its parameters, the codes and scales of quantised ones, and the buffers that training
    moves (a router's bias)."""
    state: dict[str, Tensor] = model.state_dict()
    return state


@torch.no_grad()
def load_tensors(ours: Mapping[str, Tensor], rules: Iterable[Rule], files: TensorSource, prefix: str, what: str) -> None:
    """Fill every one of our tensors, of any dtype and device, from `files`.

    prefix  what a file of the base model alone leaves out of every name; such a file is read as well.
    what    the file's name in messages.

    Raises UserError naming the tensors for one that is missing, one that no row knows, one of another shape than the model's, and a
    tied head that differs from the embedding.
    """
    rules = list(rules)
    names = _Names(files, rules, prefix, what)
    plan = _plan(dict(ours), rules, names, what)
    aliases = [rule for rule in rules if isinstance(rule, Alias) and names.real(rule.name) in names.stored]
    for name, source, place in plan:
        _read(files, name, source, place)
        for alias in aliases:  # at once: embeddings come first, when little of the model's memory is in use yet
            if alias.of == source.name:
                _check_alias(files, alias, names.real(alias.name), name, place, what)


class TensorReader:
    """Our tensors out of a file, one at a time, so that no two need be in memory; with all checks of `load_tensors` when it is made.

    shapes  our tensors, of which shape and dtype are taken: those of a model on `meta` will do.
    """

    def __init__(self, shapes: Mapping[str, Tensor], rules: Iterable[Rule], files: TensorSource, prefix: str, what: str) -> None:
        rules = list(rules)
        self._shapes, self._files, self._what = dict(shapes), files, what
        self._found = _Names(files, rules, prefix, what)
        _plan({name: torch.empty_like(tensor, device="meta") for name, tensor in shapes.items()}, rules, self._found, what)
        self._rules = {rule.ours: rule for rule in rules if not isinstance(rule, Drop | Alias)}
        self._aliases = [rule for rule in rules if isinstance(rule, Alias) and self._found.real(rule.name) in self._found.stored]

    @property
    def names(self) -> list[str]:
        """Of our tensors, in the order in which the file's rows name them."""
        return list(self._rules)

    @torch.no_grad()
    def read(self, ours: str) -> Tensor:
        """One of our tensors, on the CPU."""
        tensor = torch.empty(self._shapes[ours].shape, dtype=self._shapes[ours].dtype, device="cpu")
        for name, source, place in _plan({ours: tensor}, [self._rules[ours]], self._found, self._what):
            _read(self._files, name, source, place)
            for alias in self._aliases:
                if alias.of == source.name:
                    _check_alias(self._files, alias, self._found.real(alias.name), name, place, self._what)
        return tensor


class _Names:
    """The names a file really has for the names that rows give: with or without the prefix, or an older word."""

    def __init__(self, files: TensorSource, rules: list[Rule], prefix: str, what: str) -> None:
        self.stored = set(files.names)
        self.files = files
        self.strip = prefix if prefix and not any(name.startswith(prefix) for name in self.stored) else ""
        self.known: set[str] = set()
        for rule in rules:
            optional = [rule.name] if isinstance(rule, Drop | Alias) else []
            whole = (rule.whole,) if isinstance(rule, Stack) and rule.whole is not None else ()
            for name in [*optional, *(word for source in (*_sources(rule), *whole) for word in (source.name, *source.older))]:
                self.known.add(self.real(name))
        if extra := sorted(self.stored - self.known):
            close = nearest(extra[0], self.known)
            raise UserError(
                f"{what} holds {_count(extra, 'tensor')} this model has no place for: {_listed(extra)}.{close} "
                "Its config.json describes another model; give the one that was saved with these weights."
            )

    def real(self, name: str) -> str:
        return name.removeprefix(self.strip)

    def find(self, source: Source) -> str | None:
        """The stored name of a source, or None where the file lacks it."""
        return next((name for name in map(self.real, (source.name, *source.older)) if name in self.stored), None)


def _plan(ours: dict[str, Tensor], rules: list[Rule], names: _Names, what: str) -> list[tuple[str, Source, Tensor]]:
    """What is read and where it goes; every problem of names and shapes is found here, before anything is read."""
    plan: list[tuple[str, Source, Tensor]] = []
    missing: list[str] = []
    for rule in rules:
        if isinstance(rule, Drop | Alias):
            continue
        assert rule.ours in ours, f"the weight map fills {rule.ours}, which the model does not have"
        tensor = ours.pop(rule.ours).detach()
        pieces = list(zip(_sources(rule), split(rule, tensor), strict=True))
        if isinstance(rule, Stack) and rule.whole is not None and names.find(rule.whole) is not None:
            pieces = [(rule.whole, tensor)]
        for source, place in pieces:
            name = names.find(source)
            if name is None:
                missing.append(names.real(source.name))
                continue
            expected, given = stored_shape(source, place), tuple(names.files.shape(name))
            if expected != given:
                raise UserError(
                    f"{what}: {name} is {_shape(given)}, but {rule.ours} of this model needs {_shape(expected)} there; "
                    "config.json and weights belong to different models."
                )
            plan.append((name, source, place))
    assert not ours, f"the weight map fills no {', '.join(ours)}"
    if missing:
        raise UserError(
            f"{what} lacks {_count(missing, 'tensor')} the model needs: {_listed(missing)}. "
            "Fetch or save the model again; a file of the base model without its head has no untied lm_head."
        )
    return plan


def _sources(rule: Rule) -> tuple[Source, ...]:
    if isinstance(rule, One):
        return (rule.source,)
    return rule.sources if isinstance(rule, Cat | Stack) else ()


def split(rule: One | Cat | Stack, tensor: Tensor) -> tuple[Tensor, ...]:
    """The parts of one of our tensors, views of it, one a source."""
    if isinstance(rule, One):
        return (tensor,)
    if isinstance(rule, Cat):
        return torch.split(tensor, list(rule.sizes))
    if rule.sizes:
        return tuple(part for entry in tensor.unbind(0) for part in torch.split(entry, list(rule.sizes)))
    return tensor.unbind(0)


def stored_shape(source: Source, ours: Tensor) -> tuple[int, ...]:
    """The shape that one of our tensors, or a part of it, has in the file."""
    if isinstance(source, Transpose):
        return tuple(reversed(ours.shape))
    return source.shape if isinstance(source, Reshape) else tuple(ours.shape)


def as_stored(source: Source, ours: Tensor) -> Tensor:
    """One of our tensors, or a part of it, in the file's layout: a view wherever the layout allows one."""
    if isinstance(source, Transpose):
        return ours.t()
    if isinstance(source, Reshape):
        return ours.view(source.shape)
    if isinstance(source, Interleave):
        heads = ours.view(source.heads, -1, *ours.shape[1:])
        return torch.cat([heads[:, : source.plain], _pairs(heads[:, source.plain :]).flatten(1, 2)], 1).view(ours.shape)
    return ours


def _pairs(heads: Tensor) -> Tensor:
    """Rows [heads, width, ...] as a view [heads, width / 2, 2, ...]: channel i of a head beside channel i + width / 2."""
    return heads.view(heads.shape[0], 2, -1, *heads.shape[2:]).transpose(1, 2)


def _read(files: TensorSource, name: str, source: Source, place: Tensor) -> None:
    if isinstance(source, Interleave):
        heads = place.view(source.heads, -1, *place.shape[1:])
        stored = files.read(name, place.dtype).view(heads.shape)
        heads[:, : source.plain].copy_(stored[:, : source.plain])
        turned = _pairs(heads[:, source.plain :])
        turned.copy_(stored[:, source.plain :].reshape(turned.shape))
    else:
        files.read_into(name, as_stored(source, place))


def _check_alias(files: TensorSource, rule: Alias, alias: str, name: str, place: Tensor, what: str) -> None:
    """A second name of a shared tensor must hold the same numbers as `place`, which was read from `name`."""
    if files.shape(alias) == tuple(place.shape):
        second = files.read(alias)
        if all(
            torch.equal(mine, given.to(mine.device, mine.dtype))
            for mine, given in zip(torch.split(place, 256), torch.split(second, 256), strict=True)
        ):
            return
    raise UserError(f"{what}: {alias} differs from {name}, but {rule.cause}.")


@torch.no_grad()
def stored_tensors(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors under the file's names and layouts, in the rows' order; views where the layout allows.

    `tensors` are all parameters by our names; each must have exactly one row.
    """
    left, rows = dict(tensors), list(rules)
    shared: dict[str, Tensor | None] = {rule.of: None for rule in rows if isinstance(rule, Alias) and rule.written}
    for rule in rows:
        if isinstance(rule, Drop | Alias):
            continue
        parts = split(rule, left.pop(rule.ours).detach())
        for source, part in zip(_sources(rule), parts, strict=True):
            stored = as_stored(source, part)
            if source.name in shared:
                shared[source.name] = stored
            yield source.name, stored
    for rule in rows:
        if isinstance(rule, Alias) and rule.written:
            second = shared[rule.of]
            assert second is not None, f"{rule.name} is a second name of {rule.of}, which no row writes"
            yield rule.name, second
    assert not left, f"no row of the weight map writes {', '.join(left)}"


def _count(names: list[str], noun: str) -> str:
    return f"a {noun}" if len(names) == 1 else f"{len(names)} {noun}s"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _shape(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "a single number"
