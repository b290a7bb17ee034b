"""Reads a Hugging Face config.json strictly: every key is used, known to change nothing, or refused by name."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from weft.errors import UserError, nearest
from weft.spec.activations import Activation

# Keys that say nothing about what a forward pass computes. Anything else that a family does not read is refused unless it is null.
_BOOKKEEPING = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path architectures dtype
    finetuning_task id2label is_llama_config label2id model_type name_or_path num_labels output_past problem_type tokenizer_class
    torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version
"""
_TRAINING_AND_OUTPUT = """
    chunk_size_feed_forward gradient_checkpointing initializer_range n_special output_attentions output_hidden_states
    output_router_logits predict_special_tokens return_dict summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj tf_legacy_loss tie_encoder_decoder tie_last_hidden_states use_bfloat16 use_cache
"""
_GENERATION = """
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores pad_token_id prefix remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature top_k top_p typical_p
"""
IGNORED = frozenset((_BOOKKEEPING + _TRAINING_AND_OUTPUT + _GENERATION).split())

# Keys of many families for which one value alone is what Weft computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1, 1.0),
    "pruned_heads": ({},),
}

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


class ConfigReader:
    """One config.json being read by one family; `finish` refuses what nobody asked for."""

    def __init__(self, config: Mapping[str, Any], architectures: Iterable[str] = ()) -> None:
        """`architectures` are the class names whose weights the family holds; raises UserError for another one."""
        self.config = config
        self.model_type = str(config.get("model_type"))
        self._read: set[str] = set()
        known = tuple(architectures)
        classes = config.get("architectures") or []
        if not isinstance(classes, list):
            raise self.refuse("architectures", "it must be a list of class names.")
        for name in classes:
            if known and name not in known:
                raise self.refuse("architectures", f"Weft reads {' and '.join(known)}; give a language model's folder.")
        self._read.add("quantization_config")
        if config.get("quantization_config") is not None and scaled_blocks(config) is None:
            raise self.refuse(
                "quantization_config",
                "Weft reads fp8 with weight_block_size, unquantised safetensors, and GGUF; take one of these instead.",
            )

    def refuse(self, key: str, remedy: str) -> UserError:
        """The error for a key whose value cannot be honoured."""
        return UserError(f"config.json ({self.model_type}): {key} is {self.config.get(key)!r}; {remedy}")

    def need(self, key: str) -> Any:
        """The value of a key that must be there and not null."""
        self._read.add(key)
        if self.config.get(key) is None:
            close = nearest(key, self.config)
            raise UserError(f"config.json ({self.model_type}): the key {key} is missing; add it.{close}")
        return self.config[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default` where it is absent or null."""
        self._read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, most: int = 10**9) -> int:
        """A positive integer; without a default the key must be there. Raises UserError for anything else."""
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.refuse(key, f"it must be an integer from 1 to {most:,}.")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number; raises UserError for anything else."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(key, "it must be a number.")
        return float(value)

    def given(self, key: str, default: Any) -> Any:
        """The value of a key for which null means something: `default` only where the key is absent."""
        self._read.add(key)
        return self.config.get(key, default)

    def only(self, key: str, *allowed: Any, remedy: str = "") -> None:
        """Refuse any value of `key` but those allowed; an absent or null key passes."""
        value = self.get(key)
        if value is not None and not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed):
            choices = " or ".join(repr(item) for item in allowed)
            raise self.refuse(key, f"Weft computes {choices} only{'; ' + remedy if remedy else ''}.")

    def activation(self, key: str, default: str, names: Mapping[str, Activation] = ACTIVATIONS) -> Activation:
        """An activation in our word for it."""
        given = self.get(key, default)
        if not isinstance(given, str) or given not in names:
            raise self.refuse(key, f"Weft has {', '.join(sorted(names))}.{nearest(str(given), names)}")
        return names[given]

    def flag(self, key: str, default: bool) -> bool:
        """A true or false; raises UserError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "allowed are true and false.")
        return value

    def finish(self) -> None:
        """Refuse every key that was neither read nor is known to change nothing."""
        for key, allowed in _FIXED.items():
            if key not in self._read:
                self.only(key, *allowed)
        for key in sorted(self.config):
            if key in self._read or key in IGNORED or self.config[key] is None:
                continue
            raise self.refuse(
                key,
                f"Weft does not know this key of {self.model_type} and will not guess."
                f"{nearest(key, self._read)} Remove it from config.json if it does not change what the model computes.",
            )


def scaled_blocks(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a factor, in a checkpoint of 8-bit floats (DeepSeek-V3, Qwen3-FP8); None for any other."""
    given = config.get("quantization_config")
    if not isinstance(given, Mapping) or given.get("quant_method") != "fp8" or given.get("fmt", "e4m3") != "e4m3":
        return None
    block = given.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        return None
    return block[0], block[1]


def activation_name(ours: Activation, names: Mapping[str, Activation]) -> str:
    """The config's word for one of our activations: the first that maps to it."""
    return next(name for name, value in names.items() if value == ours)
