"""An adapter's `adapter_config.json`, read and written: PEFT's for the forms that it knows, and one of ours for bottlenecks.

PEFT has many options. Those that change what is computed and that Weft has no word for are refused by name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from weft.errors import UserError
from weft.files import read_text
from weft.spec.adapters import IA3, AdapterSettings, Bottleneck, LoRA, Prefix, Prompt

CONFIG = "adapter_config.json"
OURS = "weft_type"
# Keys that change what an adapter computes, with the one value that Weft reads.
_LORA_ONLY = {
    "bias": "none", "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None, "use_qalora": False,
    "target_parameters": None, "trainable_token_indices": None, "alora_invocation_tokens": None, "use_bdlora": None, "arrow_config": None,
    "megatron_config": None, "kasa_config": None, "monteclora_config": None, "velora_config": None,
}  # fmt: skip
_STARTS = ("gaussian", "eva", "orthogonal")  # of `init_lora_weights`; other words (pissa, olora, loftq …) change the base as well
KINDS = ("LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's adapter_config.json; raises UserError where it is no JSON object or of a kind that Weft does not read."""
    path = folder / CONFIG
    try:
        config = json.loads(read_text(path, "adapter config"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {error}. Fetch or save the adapter again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; give the folder of an adapter as PEFT or weft saves it.")
    kind = config.get("peft_type")
    if OURS not in config and kind not in KINDS:
        raise UserError(f"{path} has peft_type {kind!r}; Weft reads {', '.join(KINDS)} and its own adapters.")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise UserError(
            f"{path} has base_model_name_or_path {config['base_model_name_or_path']!r}; write the name or path of a model there."
        )
    return config


def settings_of(config: Mapping[str, Any], names: Sequence[str], path: Path) -> AdapterSettings:
    """The settings that a config describes; `names` are those of the linear maps that the adapter's file has changes of.

    Raises UserError for what Weft would compute differently.
    """
    try:
        if OURS in config:
            return Bottleneck.model_validate({"type": config[OURS], **config["settings"]})
        return _settings(config, tuple(names), path)
    except (pydantic.ValidationError, KeyError, TypeError) as error:
        if isinstance(error, pydantic.ValidationError):
            problem = error.errors()[0]
            what = f"{'.'.join(map(str, problem['loc']))} is {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"
        else:
            what = f"{error} is missing or of another type"
        raise UserError(f"{path / CONFIG} cannot be used: {what}. Fetch or save the adapter again.") from None


def _settings(config: Mapping[str, Any], names: tuple[str, ...], path: Path) -> AdapterSettings:
    kind = config["peft_type"]
    if (config.get("modules_to_save") or ["score"]) != ["score"]:
        raise UserError(f"{path / CONFIG} has modules_to_save {config['modules_to_save']}; Weft reads whole modules of score heads alone.")
    if kind == "LORA":
        for key, value in _LORA_ONLY.items():
            if config.get(key) not in (value, None, {}, []):
                raise UserError(
                    f"{path / CONFIG} has {key} {config[key]!r}, which Weft does not compute; merge the adapter with PEFT instead."
                )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in _STARTS:
            raise UserError(
                f"{path / CONFIG} has init_lora_weights {start!r}, with which PEFT changes the base too, and Weft does not; save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it."
            )
        return LoRA(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=names,
            rslora=config.get("use_rslora", False),
            dora=config.get("use_dora", False),
        )
    if kind == "IA3":
        inputs = config.get("feedforward_modules") or []
        inputs = [inputs] if isinstance(inputs, str) else inputs
        return IA3(targets=names, inputs=tuple(name for name in names if any(name == i or name.endswith(f".{i}") for i in inputs)))
    if kind == "PROMPT_TUNING":
        text = config.get("prompt_tuning_init_text") if config.get("prompt_tuning_init") == "TEXT" else None
        return Prompt(tokens=config["num_virtual_tokens"], text=text)
    return Prefix(tokens=config["num_virtual_tokens"])


def peft_config(settings: AdapterSettings, base: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter.

    facts  what the settings alone do not say: `target_modules`, `feedforward_modules`, `fan_in_fan_out`, the numbers of a prefix, …
    """
    common = {"base_model_name_or_path": base, "inference_mode": True, "revision": None, "task_type": "CAUSAL_LM"}
    if isinstance(settings, LoRA):
        own: dict[str, Any] = {
            "peft_type": "LORA",
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "use_rslora": settings.rslora,
            "use_dora": settings.dora,
            "bias": "none",
        }
    elif isinstance(settings, IA3):
        own = {"peft_type": "IA3"}
    elif isinstance(settings, Prompt):
        own = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": settings.tokens, "num_transformer_submodules": 1}
        own |= {"prompt_tuning_init": "RANDOM"}
    elif isinstance(settings, Prefix):
        own = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": settings.tokens, "num_transformer_submodules": 1}
        own |= {"prefix_projection": False}
    else:
        own = {OURS: settings.type, "settings": settings.model_dump(mode="json", exclude={"type"})}
    return {**common, **own, **facts}
