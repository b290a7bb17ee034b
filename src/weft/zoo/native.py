"""Weft's own folder, for specs that no Hugging Face family can hold: the spec in config.json, tensors under our names."""

from collections.abc import Mapping
from typing import Any

from weft.errors import UserError
from weft.spec import ModelSpec, model_spec
from weft.zoo.family import Family
from weft.zoo.rules import Rule


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    if "spec" not in config:
        raise UserError("config.json (weft): the key spec is missing; it holds the model's spec.")
    return model_spec(config["spec"], "config.json (weft): spec")


def to_config(spec: ModelSpec) -> dict[str, Any]:
    return {"spec": spec.model_dump(mode="json", exclude_defaults=True)}


def rules(spec: ModelSpec) -> list[Rule]:
    """No rows: every tensor keeps its name, and the model itself says which there are."""
    return []


NATIVE = Family(
    name="weft", model_type="weft", architecture="WeftModel", prefix="", from_config=from_config, to_config=to_config, rules=rules
)
