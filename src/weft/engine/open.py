"""From a model's name to an engine that can be asked."""

import json
from pathlib import Path
from typing import Any

from weft.device import pick_device, pick_dtype
from weft.engine.engine import Engine
from weft.errors import UserError
from weft.files import read_text
from weft.tokenizer import load_tokenizer
from weft.weights.hub import find_model
from weft.weights.load import load_weights, open_checkpoint

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def open_engine(
    source: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    rows: int = 16,
    chat: bool = False,
    memory: int | None = None,
) -> Engine:
    """An engine for a pulled model's name, a model folder or a GGUF file, with its own tokenizer.

    device, dtype  as `--device` and `--dtype` take them.
    memory         bytes for decode state, as Engine takes it.
    chat           refuse, before any weights are read, a model without a chat template.
    Raises UserError where the model cannot be had or used.
    """
    checkpoint = open_checkpoint(source)
    tokenizer = load_tokenizer(checkpoint.path)
    if chat and tokenizer.chat_template is None:
        raise UserError(
            f"{source} has no chat template, so it was not trained for conversations; continue a text with it: weft generate {source} "
            "-p '…', or chat with another model."
        )
    where = pick_device(device)
    return Engine(load_weights(checkpoint, where, pick_dtype(dtype, where)), tokenizer, rows=rows, memory=memory)


def generation_defaults(source: str | Path) -> dict[str, Any]:
    """Sampling settings that a model's generation_config.json recommends, by SamplingParams' names; empty where it recommends none."""
    path = find_model(source) / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(read_text(path, "generation config"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Repair or remove it.") from None
    if not isinstance(config, dict) or config.get("do_sample") is False:
        return {}
    found = {key: config[key] for key in SAMPLING_KEYS if isinstance(config.get(key), (int, float)) and not isinstance(config[key], bool)}
    return found if "temperature" in found or config.get("do_sample") else {}
