"""Tiny random models of transformers, one a shape worth comparing. Sizes are odd on purpose."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Case:
    """A configuration of transformers and the family that should read it and write it back."""

    name: str
    family: str
    config: Callable[[], Any]

    def __str__(self) -> str:
        return self.name


def decoder(kind: str, **changes: Any) -> Callable[[], Any]:
    """A Llama-like config: grouped heads, three layers, nothing a power of two that need not be."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 71,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return lambda: getattr(hf, f"{kind}Config")(**{**sizes, **changes})


def deepseek(kind: str, **changes: Any) -> Callable[[], Any]:
    """A DeepSeek config: latent attention, a dense layer, then two with experts."""
    sizes = {"kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 7, "num_key_value_heads": 6}
    experts = {"first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    return decoder(kind, **{**sizes, **experts, **changes})


def gpt(kind: str, **changes: Any) -> Callable[[], Any]:
    sizes = {"vocab_size": 61, "n_positions": 40, "n_embd": 36, "n_layer": 3, "n_head": 3, "bos_token_id": None, "eos_token_id": None}
    return lambda: getattr(hf, f"{kind}Config")(**{**sizes, **changes})


def gemma3(**changes: Any) -> Callable[[], Any]:
    """Seven layers, so that the sixth sees everything; two rotations, one of them stretched."""
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    sizes = {"head_dim": 10, "query_pre_attn_scalar": 13, "sliding_window": 5, "num_hidden_layers": 7, "rope_parameters": ropes}
    return decoder("Gemma3Text", **{**sizes, **changes})


def gpt_neo(**changes: Any) -> Callable[[], Any]:
    sizes = {"vocab_size": 61, "max_position_embeddings": 40, "hidden_size": 36, "num_layers": 4, "num_heads": 3, "window_size": 5}
    ends = {"bos_token_id": None, "eos_token_id": None, "attention_types": [[["global", "local"], 2]]}
    return lambda: hf.GPTNeoConfig(**{**sizes, **ends, **changes})


def mamba(**changes: Any) -> Callable[[], Any]:
    sizes = {"vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 3, "state_size": 5, "pad_token_id": None, "eos_token_id": None}
    return lambda: hf.MambaConfig(**{**sizes, "bos_token_id": None, **changes})


SHARP = {**YARN, "rope_theta": 1000.0, "mscale": 0.707, "mscale_all_dim": 0.707}
UNEVEN = {**YARN, "rope_theta": 1000.0, "mscale": 1.0, "mscale_all_dim": 0.6, "beta_fast": 20.0}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0}
# Grouped products of transformers take sizes that are multiples of four alone.
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
MIXED = ["full_attention", "sliding_attention", "full_attention"]

CASES = [
    Case("gpt1", "gpt", gpt("OpenAIGPT")),
    Case("gpt1-relu-untied", "gpt", gpt("OpenAIGPT", afn="relu", tie_word_embeddings=False)),
    Case("gpt2", "gpt2", gpt("GPT2")),
    Case("gpt2-untied", "gpt2", gpt("GPT2", tie_word_embeddings=False, n_inner=53, activation_function="relu")),
    Case("gpt2-unscaled", "gpt2", gpt("GPT2", scale_attn_weights=False, activation_function="gelu")),
    Case("llama", "llama", decoder("Llama")),
    Case("llama-tied", "llama", decoder("Llama", tie_word_embeddings=True, rms_norm_eps=1e-5)),
    Case("llama-biased", "llama", decoder("Llama", attention_bias=True, mlp_bias=True, num_key_value_heads=6)),
    Case("llama-mqa-wide-heads", "llama", decoder("Llama", num_key_value_heads=1, head_dim=10)),
    Case("llama-linear", "llama", decoder("Llama", rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0})),
    Case("llama-llama3", "llama", decoder("Llama", rope_parameters={**LLAMA3, "rope_theta": 5000.0})),
    Case("llama-yarn", "llama", decoder("Llama", rope_parameters={**YARN, "rope_theta": 1000.0})),
    Case(
        "llama-yarn-given",
        "llama",
        decoder("Llama", rope_parameters={**YARN, "rope_theta": 1000.0, "attention_factor": 1.3, "beta_fast": 20.0, "beta_slow": 2.0}),
    ),
    Case(
        "llama-yarn-mscale",
        "llama",
        decoder("Llama", rope_parameters={**YARN, "rope_theta": 1000.0, "mscale": 1.0, "mscale_all_dim": 0.7}),
    ),
    Case("mistral", "mistral", decoder("Mistral", sliding_window=5)),
    Case("mistral-odd-heads", "mistral", decoder("Mistral", sliding_window=7, num_attention_heads=5, num_key_value_heads=5, head_dim=6)),
    Case("qwen2", "qwen2", decoder("Qwen2")),
    Case("qwen2-tied", "qwen2", decoder("Qwen2", tie_word_embeddings=True)),
    Case("qwen2-windows", "qwen2", decoder("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    Case("qwen3", "qwen3", decoder("Qwen3", head_dim=10)),
    Case("qwen3-biased-tied", "qwen3", decoder("Qwen3", head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    Case("qwen3-windows", "qwen3", decoder("Qwen3", head_dim=8, use_sliding_window=True, sliding_window=5, layer_types=MIXED)),
    Case("mixtral", "mixtral", decoder("Mixtral", intermediate_size=76, num_local_experts=5, num_experts_per_tok=2, rms_norm_eps=1e-6)),
    Case(
        "mixtral-windows", "mixtral", decoder("Mixtral", intermediate_size=76, num_local_experts=3, num_experts_per_tok=3, sliding_window=5)
    ),
    Case("qwen3_moe", "qwen3_moe", decoder("Qwen3Moe", head_dim=10, **MOE)),
    Case(
        "qwen3_moe-normalised-some-dense",
        "qwen3_moe",
        decoder("Qwen3Moe", **{**MOE, "norm_topk_prob": True, "mlp_only_layers": [1], "attention_bias": True}),
    ),
    Case("gemma2", "gemma2", decoder("Gemma2", head_dim=10, query_pre_attn_scalar=13, sliding_window=5, num_hidden_layers=4)),
    Case(
        "gemma2-untied-uncapped",
        "gemma2",
        decoder(
            "Gemma2",
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=5,
            tie_word_embeddings=False,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            layer_types=MIXED,
        ),
    ),
    Case("gemma3", "gemma3", gemma3()),
    Case(
        "gemma3-untied-capped",
        "gemma3",
        gemma3(
            num_hidden_layers=3,
            head_dim=8,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            attention_bias=True,
            final_logit_softcapping=5.0,
            layer_types=MIXED,
            rope_parameters=None,
        ),
    ),
    Case("gpt-neo", "gpt-neo", gpt_neo()),
    Case(
        "gpt-neo-untied",
        "gpt-neo",
        gpt_neo(
            tie_word_embeddings=False,
            intermediate_size=53,
            num_layers=3,
            activation_function="relu",
            attention_types=[[["global"], 1], [["local"], 2]],
        ),
    ),
    Case("deepseek-v2-lite", "deepseek_v2", deepseek("DeepseekV2", q_lora_rank=None, rope_parameters=SHARP)),
    Case("deepseek-v2", "deepseek_v2", deepseek("DeepseekV2", q_lora_rank=15, n_shared_experts=1, rope_parameters=UNEVEN, **LIMITED)),
    Case("deepseek-v3", "deepseek_v3", deepseek("DeepseekV3", q_lora_rank=15, n_group=4, topk_group=2, rope_parameters=SHARP)),
    Case(
        "deepseek-v3-plain",
        "deepseek_v3",
        deepseek("DeepseekV3", q_lora_rank=None, n_group=1, topk_group=1, first_k_dense_replace=0, norm_topk_prob=False),
    ),
    Case("mamba", "mamba", mamba()),
    Case("mamba-biased-untied", "mamba", mamba(use_bias=True, use_conv_bias=False, tie_word_embeddings=False, conv_kernel=3, expand=3)),
]


def oracle(case: Case, seed: int = 0) -> Any:
    """The model of transformers with weights large enough that every part shows in the logits; gains and biases are random too."""
    torch.manual_seed(seed)
    # A selective scan multiplies three projections of its input: at a gain of 1.3 float32 itself is 3e-5 from float64, in both libraries.
    gain = 0.9 if case.family == "mamba" else 1.3
    model = hf.AutoModelForCausalLM.from_config(case.config(), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log") or "norm" in name or "ln_" in name or name.endswith(".D"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("dt_proj.bias"):
                parameter.copy_(torch.randn_like(parameter) - 1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 else gain * parameter.shape[-1] ** -0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def tokens(vocab: int = 61, batch: int = 3, length: int = 31) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(7))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """fp32 logits [B, T, vocab] of a model of transformers."""
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits if not isinstance(model, hf.OpenAIGPTLMHeadModel) else model(ids).logits
    return result.float()
