"""config.json as it is found in the wild, in the styles of transformers 4 and 5, and what is refused by name."""

from typing import Any

import pytest

from weft.errors import UserError
from weft.spec import Attention, LinearScaling, Llama3Scaling, ModelSpec, YarnScaling
from weft.zoo import ENTRIES, from_config
from weft.zoo.family import canonical

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "initializer_range": 0.02,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
GPT_NEO = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 6,
    "attention_types": [[["global", "local"], 6]],
    "bos_token_id": 50256,
    "embed_dropout": 0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 12,
    "num_layers": 12,
    "resid_dropout": 0,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "transformers_version": "4.9.0.dev0",
    "use_cache": True,
    "vocab_size": 50257,
    "window_size": 256,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "output_past": True,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "d_inner": 1536,
    "d_model": 768,
    "eos_token_id": 0,
    "expand": 2,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": 768,
    "initializer_range": 0.1,
    "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "n_layer": 24,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": 16,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 48,
    "time_step_scale": 1.0,
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 50280,
}


def spec_of(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return from_config({**config, **changes})[1]


def mixer_of(spec: ModelSpec, layer: int = 0) -> Attention:
    mixer = spec.blocks()[layer].mixer
    assert isinstance(mixer, Attention)
    return mixer


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SMOLLM2, "smollm2-135m"),
        (QWEN25, "qwen2.5-0.5b"),
        (GEMMA2, "gemma2-27b"),
        (GEMMA3, "gemma3-1b"),
        (GPT2, "gpt2"),
        (GPT_NEO, "gptneo-125m"),
        (MAMBA, "mamba-130m"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_configs_are_the_published_sizes(config: dict[str, Any], name: str) -> None:
    assert canonical(spec_of(config)) == canonical(ENTRIES[name].spec)


def test_missing_keys_take_the_class_defaults_of_transformers() -> None:
    sizes = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 99, "num_hidden_layers": 2, "num_attention_heads": 32}
    assert mixer_of(spec_of({"model_type": "llama", **sizes})).num_kv_heads == 32
    mistral = mixer_of(spec_of({"model_type": "mistral", **sizes}))
    assert (mistral.num_kv_heads, mistral.window) == (8, 4096)
    assert mixer_of(spec_of({"model_type": "mistral", **sizes, "sliding_window": None})).window is None
    qwen3 = spec_of({"model_type": "qwen3", **sizes})
    assert mixer_of(qwen3).width(512) == 128
    assert not qwen3.tie_embeddings
    gemma = spec_of({"model_type": "gemma2", **sizes})
    assert gemma.tie_embeddings
    assert [mixer_of(gemma, i).window for i in range(2)] == [4096, None]


def test_rotary_scalings_of_both_styles() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = spec_of(SMOLLM2, rope_scaling={"rope_type": "llama3", **scaling})
    new = spec_of({**SMOLLM2, "rope_theta": None}, rope_parameters={"rope_type": "llama3", "rope_theta": 100000, **scaling})
    assert old == new
    assert mixer_of(old).rope.scaling == Llama3Scaling(factor=8.0)
    assert mixer_of(old).rope.base == 100000
    linear = spec_of(SMOLLM2, rope_scaling={"type": "linear", "factor": 4.0})
    assert mixer_of(linear).rope.scaling == LinearScaling(factor=4.0)
    yarn = spec_of(SMOLLM2, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert mixer_of(yarn).rope.scaling == YarnScaling(factor=4.0, original_context=8192)
    implicit = spec_of(SMOLLM2, rope_scaling={"type": "yarn", "original_max_position_embeddings": 2048})
    assert mixer_of(implicit).rope.scaling == YarnScaling(factor=4.0, original_context=2048)


def test_a_rotation_a_kind_of_layer_in_both_styles() -> None:
    old = spec_of(GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0})
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
    }
    without = {key: value for key, value in GEMMA3.items() if not key.startswith("rope")}
    assert spec_of(without, rope_parameters=ropes) == old
    local, full = mixer_of(old, 0), mixer_of(old, 5)
    assert (local.window, local.rope.base, local.rope.scaling) == (512, 10000, None)
    assert (full.window, full.rope.base, full.rope.scaling) == (None, 1000000, LinearScaling(factor=8.0))
    assert spec_of(GEMMA3, layer_types=["full_attention"] * 26) != spec_of(GEMMA3)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (SMOLLM2, {"hidden_act": "quick_gelu"}, ["hidden_act", "quick_gelu", "silu"]),
        (SMOLLM2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "dynamic", "yarn"]),
        (SMOLLM2, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope"]),
        (SMOLLM2, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate"]),
        (SMOLLM2, {"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        (SMOLLM2, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "betafast": 3}}, ["betafast"]),
        (SMOLLM2, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
        (SMOLLM2, {"rope_scaling": "linear"}, ["rope_scaling", "mapping"]),
        (SMOLLM2, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters", "layer"]),
        (SMOLLM2, {"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["keep one"]),
        (SMOLLM2, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        (SMOLLM2, {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq", "GGUF"]),
        (SMOLLM2, {"pretraining_tp": 2}, ["pretraining_tp", "2"]),
        (SMOLLM2, {"rope_interleaved": True}, ["rope_interleaved", "True"]),
        (SMOLLM2, {"attention_bias": "yes"}, ["attention_bias", "yes"]),
        (SMOLLM2, {"architectures": ["LlamaForTokenClassification"]}, ["architectures", "LlamaForCausalLM"]),
        (SMOLLM2, {"num_experts": 8}, ["num_experts", "8", "Remove it"]),
        (SMOLLM2, {"use_rope": False}, ["use_rope", "False"]),
        (SMOLLM2, {"auto_map": {"AutoModel": "x.py"}}, ["auto_map"]),
        (SMOLLM2, {"num_key_value_heads": 2}, ["heads is 9", "kv_heads 2"]),
        (SMOLLM2, {"vocab_size": "many"}, ["vocab", "many"]),
        (SMOLLM2, {"vocab_size": None}, ["vocab_size", "missing"]),
        (SMOLLM2, {"model_type": "phi3"}, ["phi3", "llama"]),
        (SMOLLM2, {"model_type": "lama"}, ["Did you mean 'llama'"]),
        (SMOLLM2, {"model_type": None}, ["model_type"]),
        (QWEN25, {"use_mrope": True}, ["use_mrope", "True"]),
        (QWEN25, {"layer_types": ["sliding_attention"] * 24}, ["layer_types", "sliding_window"]),
        (QWEN25, {"layer_types": ["full_attention"] * 3}, ["layer_types", "24"]),
        (QWEN25, {"layer_types": ["chunked_attention"] * 24}, ["layer_types"]),
        (GEMMA2, {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        (GEMMA2, {"sliding_window_size": 512}, ["sliding_window_size", "512"]),
        (GEMMA3, {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "null"]),
        (GEMMA3, {"sliding_window": None}, ["layer_types", "sliding_window"]),
        (GEMMA3, {"sliding_window": 0}, ["window is 0", "greater than 0"]),
        (GEMMA3, {"rope_parameters": {"rope_type": "default"}}, ["rope_parameters", "full_attention"]),
        (GEMMA3, {"rope_parameters": {}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["keep one"]),
        (GEMMA3, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling", "dynamic"]),
        (GEMMA3, {"model_type": "gemma3"}, ["image encoder", "language_model", "text_config"]),
        (GPT_NEO, {"attention_types": [[["global", "local"], 5]]}, ["attention_types", "12 layers"]),
        (GPT_NEO, {"attention_types": [[["global", "banded"], 6]]}, ["attention_types", "global and local"]),
        (GPT_NEO, {"attention_types": [[["global"], 10**9]]}, ["attention_types", "12 layers"]),
        (GPT_NEO, {"attention_layers": ["global"] * 12}, ["attention_layers", "keep one"]),
        (GPT_NEO, {"window_size": 0}, ["window_size", "from 1"]),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        (GPT2, {"add_cross_attention": True}, ["add_cross_attention"]),
        (GPT2, {"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        (GPT2, {"pruned_heads": {"1": [2]}}, ["pruned_heads"]),
        (GPT2, {"n_head": 7}, ["dim is 768", "heads 7"]),
        (MAMBA, {"d_model": 700}, ["d_model", "700", "768"]),
        (MAMBA, {"rms_norm": False}, ["rms_norm"]),
        (MAMBA, {"ssm_cfg": {"layer": "Mamba2"}}, ["ssm_cfg", "Mamba2"]),
        (MAMBA, {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_weft_would_compute_differently_is_refused_by_name(config: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        spec_of(config, **change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_key_that_is_null_passes() -> None:
    assert spec_of(SMOLLM2, attn_logit_cap=None) == spec_of(SMOLLM2)


WEIRD = [None, -1, 0, 3, 10**30, 1.5, float("nan"), float("inf"), True, "x", "", [], [1], {}, {"type": "yarn"}, {"rope_theta": [2]}]


@pytest.mark.parametrize("config", [SMOLLM2, QWEN25, GEMMA2, GEMMA3, GPT2, GPT_NEO, MAMBA], ids=lambda config: config["model_type"])
def test_no_value_of_any_key_does_more_than_be_refused(config: dict[str, Any]) -> None:
    """A damaged config gives a spec or a sentence, never another exception and never a hang."""
    extra = ("rope_scaling", "rope_parameters", "layer_types", "head_dim", "sliding_window", "tie_word_embeddings", "nonsense", "n_inner")
    messages = []
    for key in {*config, *extra}:
        for value in WEIRD:
            try:
                spec_of(config, **{key: value})
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert max(map(len, messages)) < 700
