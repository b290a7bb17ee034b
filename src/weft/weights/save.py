"""Writes a model as a folder that transformers, Weft and other tools load: config.json, safetensors, tokenizer."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from weft.errors import UserError
from weft.files import atomic_folder, atomic_write
from weft.nn import Model
from weft.spec import ModelSpec
from weft.weights.adapter_files import write_adapter
from weft.weights.files import write_safetensors
from weft.weights.map import identity_rules, stored_state, stored_tensors
from weft.zoo import Family, class_name, describe, rules_of

# What a model folder may hold: a folder with anything else in it is somebody's, and is not replaced.
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.md",
    "*.txt",
    "*.png",
    "*.yaml",
    "LICENSE*",
    ".gitattributes",
    "additional_chat_templates",
)


class SavedTokenizer(Protocol):
    """What saving asks of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> Iterable[int]: ...

    @property
    def pad_id(self) -> int | None: ...

    def save(self, folder: Path) -> object: ...


def save_model(
    model: Model,
    folder: str | Path,
    tokenizer: SavedTokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    family: Family | None = None,
) -> Path:
    """Write a model folder in one step: a reader, or a crash, sees the old folder or the new one.

    tokenizer  saved beside the weights; its special ids go into config.json and generation_config.json.
    dtype      what weights are rounded to; None keeps the model's.
    family     tried first; otherwise the first family of the zoo that can hold the model's spec, ours if none can.

    Raises UserError where `folder` holds files that are no part of a model.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_folder(folder) as partial:
        write_folder(model, partial, tokenizer, dtype, max_shard_bytes, family)
    return folder


def write_folder(
    model: Model,
    folder: Path,
    tokenizer: SavedTokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    family: Family | None = None,
) -> None:
    """The same into an existing empty folder, file by file. Of a model with an adapter, the adapter is written, in its own numbers."""
    if model.adapters is not None:
        write_adapter(model, folder)
        if tokenizer is not None:
            tokenizer.save(folder)
        return
    family = write_config(model.spec, folder, dtype or model.dtype, tokenizer, family)
    rules = rules_of(family, model.spec) or identity_rules(model)
    write_safetensors(folder, stored_tensors(stored_state(model), rules), max_shard_bytes, dtype=dtype)


def write_config(
    spec: ModelSpec, folder: Path, dtype: torch.dtype, tokenizer: SavedTokenizer | None = None, family: Family | None = None
) -> Family:
    """All of a model folder but the weights, whose names are the returned family's.

    dtype  that the weights are stored in.
    """
    family, described = describe(spec, family)
    ids = special_ids(tokenizer)
    if spec.score is not None and ids["pad_token_id"] in (tokenizer.eos_ids if tokenizer is not None else ()):
        ids["pad_token_id"] = None  # transformers' classifiers would take a text's end token for padding, and read the one before it
    config = {
        "architectures": [class_name(family, spec)],
        "model_type": family.model_type,
        **described,
        **ids,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", config)
    if ids["eos_token_id"] is not None:
        _write_json(folder / "generation_config.json", ids)
    if tokenizer is not None:
        tokenizer.save(folder)
    return family


def special_ids(tokenizer: SavedTokenizer | None) -> dict[str, Any]:
    """The ids of a tokenizer under transformers' names. All are written, null too: an absent key means the class's default there."""
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        ends = list(tokenizer.eos_ids)
        ids["bos_token_id"], ids["pad_token_id"] = tokenizer.bos_id, tokenizer.pad_id
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return ids


def check_replaceable(folder: Path) -> None:
    """Raise UserError where writing a model folder would destroy something that is not one."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the name of a folder to write the model into.")
    if not folder.is_dir():
        return
    strange = [path.name for path in sorted(folder.iterdir()) if not any(path.match(form) for form in _MODEL_FILES)]
    described = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if strange or (any(folder.iterdir()) and not described):
        shown = strange[0] if strange else next(folder.iterdir()).name
        raise UserError(f"{folder} holds {shown}, which is no part of a model, and would be replaced; give a new or empty folder.")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
