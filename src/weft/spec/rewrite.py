"""Specs made out of other specs. Importable without torch."""

from collections.abc import Mapping
from typing import Any

from weft.errors import UserError
from weft.spec.model import ModelSpec, model_spec


def with_rope(spec: ModelSpec, changes: Mapping[str, Any], context: int | None = None) -> ModelSpec:
    """The model with other rotary positions in every layer that has any, and room for `context` tokens.

    changes  keys of `Rope` with their new values, such as `{"base": 500000}`; the others stay as they are.

    Raises UserError where no layer has any, where positions are learned and too few, and for a scaling that also scales scores.
    """
    data = spec.model_dump()
    found = _rotate(data["layers"], changes)
    if changes and not found:
        raise UserError(
            f"a stage changes rotary positions ({', '.join(changes)}), but no layer of the model has any; take `rope` out of it."
        )
    made = model_spec({**data, "context": context or spec.context}, "stages")
    if _score_factors(made) != _score_factors(spec):
        raise UserError("a stage would take the place of a scaling with mscale_all_dim, which is part of how layers are built; keep it.")
    return made


def _rotate(node: Any, changes: Mapping[str, Any]) -> int:
    """Change every `rope` inside a dumped spec, in place; returns how many there were."""
    if isinstance(node, dict):
        has = isinstance(node.get("rope"), dict)
        if has:
            node["rope"] = {**node["rope"], **changes}
        return has + sum(_rotate(inner, changes) for key, inner in node.items() if key != "rope")
    return sum(_rotate(inner, changes) for inner in node) if isinstance(node, list | tuple) else 0


def _score_factors(spec: ModelSpec) -> list[float]:
    ropes = [getattr(part, "rope", None) for block in spec.blocks() for part in block.parts().values()]
    return [rope.score_factor for rope in ropes if rope is not None]
