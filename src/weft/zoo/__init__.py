"""Families as data: published sizes, config.json both ways, and one weight map each. Importing this package never imports torch."""

from collections.abc import Mapping
from typing import Any

import pydantic

from weft.errors import UserError, nearest, unknown
from weft.spec import ModelSpec
from weft.zoo import deepseek, gemma, gemma3, gpt, gpt_neo, llama, mamba, mistral, mixtral, qwen, qwen_moe
from weft.zoo.classifier import class_name, held, language_model, read_spec, rules_of, score_config
from weft.zoo.family import Entry, Family, explained, expresses
from weft.zoo.native import NATIVE

# In this order a spec is offered to them: the most widely understood first, ours last.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.LLAMA,
        mistral.MISTRAL,
        qwen.QWEN2,
        qwen.QWEN3,
        mixtral.MIXTRAL,
        qwen_moe.QWEN3_MOE,
        gemma.GEMMA2,
        gemma3.GEMMA3,
        gpt.GPT2,
        gpt.GPT1,
        gpt_neo.GPT_NEO,
        deepseek.V2,
        deepseek.V3,
        mamba.MAMBA,
        NATIVE,
    )
}

# Kinds of checkpoint that are near to what Weft reads, and what to do with them.
REFUSED = {"gemma3": gemma3.IMAGES}

_MODULES = (gpt, gpt_neo, llama, mistral, mixtral, qwen, qwen_moe, gemma, gemma3, deepseek, mamba)
ENTRIES: dict[str, Entry] = {entry.name: entry for module in _MODULES for entry in module.ENTRIES}

__all__ = [
    "ENTRIES", "FAMILIES", "Entry", "Family", "class_name", "describe", "entry", "family_of", "from_config", "held", "rules_of",
]  # fmt: skip


def entry(name: str) -> Entry:
    """The published size called `name`; raises UserError with the nearest name."""
    if name not in ENTRIES:
        raise UserError(f"unknown model '{name}'.{nearest(name, ENTRIES)} `weft models` lists all {len(ENTRIES)}.")
    return ENTRIES[name]


def from_config(config: Mapping[str, Any]) -> tuple[Family, ModelSpec]:
    """The family and spec that a config.json describes.

    Raises UserError naming the key and value for anything Weft would compute differently, and for keys it does not know.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise UserError("config.json has no key model_type; give the folder of a language model as transformers or weft saves it.")
    by_type = {family.model_type: family for family in FAMILIES.values()}
    family = by_type.get(str(model_type))
    if family is None:
        if str(model_type) in REFUSED:
            raise UserError(REFUSED[str(model_type)])
        raise unknown("model_type in config.json", str(model_type), by_type)
    try:
        return family, read_spec(family, config)
    except pydantic.ValidationError as error:
        raise explained(f"config.json ({model_type})", error) from None


def describe(spec: ModelSpec, prefer: Family | None = None) -> tuple[Family, dict[str, Any]]:
    """The family a spec is saved as and the architecture keys of its config.json: the first family that reads it back unchanged.

    `prefer` is asked first: a Mistral without a window can be saved as Llama, but who loaded a Mistral expects one.
    """
    first, model = [prefer] if prefer is not None else [], language_model(spec)
    for family in [*first, *FAMILIES.values()]:
        if family is NATIVE or (spec.score is not None and family.classifier is None):
            continue
        if (config := expresses(family, model)) is not None:
            return family, {**config, **score_config(spec)}
    return NATIVE, NATIVE.to_config(spec)


def family_of(spec: ModelSpec) -> Family:
    """The family a spec is saved as; `weft` where no Hugging Face family can hold it."""
    return describe(spec)[0]
