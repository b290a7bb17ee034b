"""From a model's name to an engine that can be asked."""

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from weft.device import pick_device, pick_dtype
from weft.engine.budget import default_memory
from weft.engine.draft import Drafter, ModelDrafter, NgramDrafter
from weft.engine.engine import Engine
from weft.engine.mtp_draft import MTPDrafter, check_depth
from weft.errors import UserError
from weft.files import read_text
from weft.nn import Model
from weft.spec import ModelSpec
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.tokenizer.compare import same_ids
from weft.weights.adapter_base import find_base
from weft.weights.adapter_files import is_adapter, put_adapters, read_adapter
from weft.weights.hub import find_model
from weft.weights.load import Checkpoint, load_weights, open_checkpoint

Adapter = str | Path | Mapping[str, str] | None
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
DRAFT_SHARE = 4


@dataclass(frozen=True)
class OpenModel:
    """A model in memory, with all that an engine needs; what memory is left is known once every model of a process is one.

    draft  None, "ngram", the model that drafts for it, or how many tokens its own modules for multi-token prediction draft.
    """

    model: Model
    tokenizer: Tokenizer
    draft: Model | Literal["ngram"] | int | None = None

    def engine(self, rows: int = 16, memory: int | None = None) -> Engine:
        """`memory` bytes are for decode state, as Engine takes them; a draft model has a quarter of them, the model's own modules their
        share a token."""
        if self.draft is None or isinstance(self.draft, str):
            return Engine(self.model, self.tokenizer, rows=rows, memory=memory, draft=NgramDrafter() if self.draft else None)
        memory = default_memory(self.model.device) if memory is None else memory
        if isinstance(self.draft, Model):
            share = memory // DRAFT_SHARE
            drafter: Drafter = ModelDrafter(self.draft, rows=rows, memory=share)
        else:
            share = int(memory * _mtp_share(self.model.spec))
            drafter = MTPDrafter(self.model, self.draft, rows=rows, memory=share)
        return Engine(self.model, self.tokenizer, rows=rows, memory=memory - share, draft=drafter)


def _mtp_share(spec: ModelSpec) -> float:
    """The part of all decode state at the model's full context that its modules for multi-token prediction have."""
    ours = spec.mtp_state_bytes(spec.context)
    return ours / (ours + spec.state_bytes(spec.context))


def _mtp_depth(draft: str, spec: ModelSpec) -> int | None:
    """How many tokens `mtp` or `mtp:N` drafts; None for another word."""
    word, colon, number = draft.partition(":")
    if word != "mtp" or (colon and not number.isdecimal()):
        return None
    return check_depth(spec, int(number) if colon else None)


def open_engine(
    source: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    rows: int = 16,
    chat: bool = False,
    memory: int | None = None,
    draft: str = "none",
    fast: bool = False,
    int8_state: bool = False,
    adapter: Adapter = None,
) -> Engine:
    """An engine for a pulled model's name, a model folder or a GGUF file: `open_model`, then `OpenModel.engine`."""
    return open_model(source, device, dtype, chat, draft, fast, int8_state, adapter).engine(rows, memory)


def open_model(
    source: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    chat: bool = False,
    draft: str = "none",
    fast: bool = False,
    int8_state: bool = False,
    adapter: Adapter = None,
) -> OpenModel:
    """A pulled model's name, a model folder or a GGUF file, with its own tokenizer. An adapter's folder stands for its base with it.

    device, dtype  as `--device` and `--dtype` take them.
    chat           refuse, before any weights are read, a model without a chat template.
    draft          none, ngram, mtp or mtp:N for the model's own modules for multi-token prediction, all or N of them, or a smaller model
                   of the same tokenizer, named as `source` is.
    fast           as `--fast`: a quantised model reads prompts with coarser products; what a token gets then depends on its chunk.
    int8_state     keep keys and values in 8 bits.
    adapter        the folder of an adapter to put on the model; or several by name, of which each request chooses one, or none.
    Raises UserError where the model cannot be had or used.
    """
    several = adapter if isinstance(adapter, Mapping) else {}
    checkpoint = open_checkpoint(source, None if isinstance(adapter, Mapping) else adapter)
    stored = {name: read_adapter(folder) for name, folder in several.items()}
    if stored and checkpoint.adapter is not None:
        raise UserError(f"{source} is an adapter itself; give the model that it is for, and it beside the others.")
    tokenizer = load_tokenizer(checkpoint.path)
    if chat and tokenizer.chat_template is None:
        raise UserError(
            f"{source} has no chat template, so it was not trained for conversations; continue a text with it: weft generate {source} "
            "-p '…', or chat with another model."
        )
    depth = _mtp_depth(draft, checkpoint.spec)
    model = open_weights(checkpoint, device, dtype)
    if stored:
        put_adapters(model, stored, checkpoint.family)
    model.fast, model.int8_state = fast, int8_state
    drafting: Model | Literal["ngram"] | int | None = depth
    if draft == "ngram":
        drafting = "ngram"
    elif draft != "none" and depth is None:
        drafting = _open_draft(draft, tokenizer, device, dtype)
    gc.collect()
    gc.freeze()  # the model's ten thousand objects stay: looking through them again and again took a fiftieth of a token's time
    return OpenModel(model, tokenizer, drafting)


def _open_draft(source: str, tokenizer: Tokenizer, device: str, dtype: str) -> Model:
    checkpoint = open_checkpoint(source)
    if not same_ids(tokenizer, load_tokenizer(checkpoint.path)):
        raise UserError(f"{source} cannot draft for this model, as its tokenizer is another one; take a draft model of the same family.")
    return open_weights(checkpoint, device, dtype)


def open_weights(checkpoint: Checkpoint, device: str = "auto", dtype: str = "auto") -> Model:
    """The model of a checkpoint in the numbers a user asked for.

    `auto` keeps quantised weights as they are stored and computes in float32 with them, which costs no time; it takes other models in
    bfloat16. A dtype that is named is the dtype of everything, and a GGUF file's weights are then dequantised.
    """
    where = pick_device(device)
    if dtype == "auto" and checkpoint.quant is not None:
        return load_weights(checkpoint, where, torch.float32, packed=True)
    return load_weights(checkpoint, where, pick_dtype(dtype, where))


def generation_defaults(source: str | Path) -> dict[str, Any]:
    """Sampling settings that a model's generation_config.json recommends, by SamplingParams' names; empty where it recommends none."""
    folder = find_model(source)
    if is_adapter(folder):
        folder = find_model(find_base(read_adapter(folder).base, folder))
    path = folder / "generation_config.json"
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
