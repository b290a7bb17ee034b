"""What every spec shares: strictness, immutability, and errors a person can act on. Importable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, TypeAdapter, model_serializer

from weft.errors import UserError, nearest

GrowthLaw = Literal["append", "ring", "fixed", "static"]


class Spec(BaseModel):
    """Base of every node of a spec tree: frozen, strict, hashable by value, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _keep_type(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write `type` even where defaults are left out: without it a union could not be read back."""
        data: dict[str, Any] = handler(self)
        return {"type": self.type, **data} if hasattr(self, "type") else data


@dataclass(frozen=True)
class Leaf:
    """One named piece of decode state and the law by which it grows.

    kind    "append": an entry a token, addressed by position; "ring": the last `window` entries; "fixed": constant size,
            overwritten each token; "static": written once a request.
    shape   of one entry: per token for append and ring, per row for fixed and static.
    window  entries a query may look back on, itself included (ring only).
    pinned  first entries of the text that stay for ever, before the ring (ring only).
    dtype   None takes the arena's dtype; accumulators say "float32", counts say "int64".
    fill    the value of an entry nobody has written.
    shard   the axis of `shape` that tensor parallelism divides, or None.
    """

    kind: GrowthLaw
    shape: tuple[int, ...]
    window: int | None = None
    dtype: Literal["float32", "int64"] | None = None
    fill: float = 0.0
    shard: int | None = None
    pinned: int = 0

    def entries(self, length: int) -> int:
        """Entries held for a sequence of `length` tokens (a ring without room for rejected drafts)."""
        if self.kind == "append":
            return length
        if self.kind == "ring":
            assert self.window is not None
            return min(length, self.pinned + self.window)
        return 1

    def slots(self, length: int, max_chunk: int) -> int:
        """Slots of a ring for texts of up to `length` tokens, with room for a chunk that may yet be rejected."""
        assert self.window is not None
        return min(self.pinned + self.window - 1 + max_chunk, length)

    def num_bytes(self, length: int, itemsize: int) -> int:
        """Bytes held for `length` tokens when the arena's dtype has `itemsize` bytes."""
        size = {"float32": max(4, itemsize), "int64": 8, None: itemsize}[self.dtype]
        for axis in self.shape:
            size *= axis
        return size * self.entries(length)


StateSpec = Mapping[str, Leaf]
S = TypeVar("S")


def parse(kind: type[S] | Any, data: Any, what: str) -> S:
    """Validate `data` against a spec type and turn pydantic's report into one clear sentence.

    Raises UserError naming the key, what was given, what is allowed and the nearest allowed name.
    """
    adapter: TypeAdapter[S] = TypeAdapter(kind)
    try:
        return adapter.validate_python(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{what}: {_explain(kind, error)}") from None


def _explain(kind: Any, error: pydantic.ValidationError) -> str:
    """The most telling problem of a pydantic report as one sentence."""
    problems = error.errors()
    # A misspelt key also reports the key it should have been as missing: the misspelling is the one to tell.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path, given = _walk(kind, problem["loc"])[0], problem["input"]
    where = ".".join(path) or "the top level"
    if problem["type"] == "extra_forbidden":
        owners = _walk(kind, problem["loc"][:-1])[1]
        allowed = sorted({name for owner in owners for name in owner.model_fields})
        return f"unknown key '{path[-1]}' at {where}.{nearest(path[-1], allowed)} Allowed here: {', '.join(allowed)}."
    if problem["type"] == "missing":
        return f"the key '{path[-1]}' is missing at {where}; add it."
    if problem["type"] in ("union_tag_invalid", "literal_error"):
        context = problem.get("ctx", {})
        expected = str(context.get("expected_tags") or context.get("expected"))
        allowed = [word.strip(" '") for word in expected.replace(" or ", ", ").split(",")]
        value = str(context.get("tag", given))
        return f"'{value}' is not known at {where}.{nearest(value, allowed)} Allowed: {', '.join(allowed)}."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] in ("value_error", "assertion_error"):
        return f"{message} (at {where})"
    return f"{where} is {given!r}, but {message[0].lower()}{message[1:]}."


def _walk(kind: Any, path: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """Follow a path through fields, list items and union branches: its parts without the branches' names, and where it ends."""
    shown, candidates = [], _models_in(kind)
    for part in path:
        branch = [c for c in candidates if part in (c.__name__, _tag(c))]
        if branch and (len(candidates) > 1 or not any(part in c.model_fields for c in candidates)):
            candidates = branch
            continue
        shown.append(str(part))
        if not isinstance(part, int):
            candidates = [m for c in candidates if part in c.model_fields for m in _models_in(c.model_fields[part].annotation)]
    return shown, candidates


def _tag(model: type[BaseModel]) -> Any:
    return model.model_fields["type"].default if "type" in model.model_fields else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every spec class an annotation may hold, looking through unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]
