"""Mixtral and Qwen3-MoE: published config.json files, sizes total and active, and what is refused."""

from typing import Any

import pytest

from weft.errors import UserError
from weft.spec import Experts, Gated, model_spec
from weft.zoo import ENTRIES, describe, from_config
from weft.zoo.family import canonical

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def spec_of(config: dict[str, Any], **changes: Any) -> Any:
    return from_config({**config, **changes})[1]


@pytest.mark.parametrize(("config", "name"), [(MIXTRAL, "mixtral-8x7b"), (QWEN, "qwen3-30b-a3b")])
def test_published_configs_are_the_published_sizes(config: dict[str, Any], name: str) -> None:
    assert canonical(spec_of(config)) == canonical(ENTRIES[name].spec)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("mixtral-8x7b", 46.7, 12.9), ("mixtral-8x22b", 141, 39), ("qwen3-30b-a3b", 30.5, 3.3), ("qwen3-235b-a22b", 235, 22)],
)
def test_total_and_active_parameters(name: str, total: float, active: float) -> None:
    spec = ENTRIES[name].spec
    assert spec.num_params() / 1e9 == pytest.approx(total, rel=0.02)
    assert spec.num_params(active=True) / 1e9 == pytest.approx(active, rel=0.02)


def test_dense_layers_among_sparse_ones() -> None:
    def kinds(**changes: Any) -> str:
        return "".join("e" if isinstance(b.channel, Experts) else "d" for b in spec_of(QWEN, num_hidden_layers=6, **changes).blocks())

    assert kinds() == "eeeeee"
    assert kinds(mlp_only_layers=[0, 4]) == "deeede"
    assert kinds(decoder_sparse_step=2) == "dedede"
    assert kinds(decoder_sparse_step=3, mlp_only_layers=[5]) == "ddeddd"
    spec = spec_of(QWEN, num_hidden_layers=6, mlp_only_layers=[1])
    assert spec.blocks()[1].channel == Gated(hidden=6144)
    family, config = describe(spec)
    assert (family.name, config["mlp_only_layers"]) == ("qwen3_moe", [1])


def test_the_name_that_transformers_gives_the_number_of_experts() -> None:
    renamed = {key: value for key, value in QWEN.items() if key != "num_experts"} | {"num_local_experts": 128}
    assert spec_of(renamed) == spec_of(QWEN)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (MIXTRAL, {"num_experts_per_tok": 9}, r"top_k is 9 but there are 8 experts"),
        (MIXTRAL, {"num_local_experts": 0}, r"num_local_experts is 0; it must be an integer"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, r"router_jitter_noise is 0\.1; Weft computes 0"),
        (MIXTRAL, {"num_experts": 4}, r"num_experts is 4; Weft does not know this key"),
        (QWEN, {"num_experts_per_tok": 129}, r"top_k is 129 but there are 128 experts"),
        (QWEN, {"mlp_only_layers": [48]}, r"mlp_only_layers is \[48\]; it must list layers from 0 to 47"),
        (QWEN, {"mlp_only_layers": 3}, r"mlp_only_layers is 3; it must list layers"),
        (QWEN, {"norm_topk_prob": "yes"}, r"norm_topk_prob is 'yes'; allowed are true and false"),
        (QWEN, {"shared_expert_intermediate_size": 9}, r"shared_expert_intermediate_size is 9; Weft does not know this key"),
    ],
)
def test_what_cannot_be_honoured_is_a_sentence(config: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        spec_of(config, **changes)


@pytest.mark.parametrize("change", [{"shared": 1}, {"score": "sigmoid"}, {"choice_bias": True}, {"scale": 2.0}, {"groups": 2}])
def test_no_family_claims_what_its_config_cannot_say(change: dict[str, Any]) -> None:
    """Control: the same experts without the change are Mixtral's."""

    def family(**fields: Any) -> str:
        channel = {"type": "experts", "experts": 4, "top_k": 2, "hidden": 8, **fields}
        layer = {"mixer": {"type": "attention", "heads": 2, "rope": {}}, "channel": channel}
        spec = model_spec({"vocab": 7, "dim": 8, "norm": {"type": "rms"}, "tie_embeddings": False, "layers": [layer]})
        return describe(spec)[0].name

    assert family() == "mixtral"
    assert family(balance_loss=0.1, capacity=1.5) == "mixtral", "how it is trained is no part of the model"
    assert family(normalise=False) == "weft"
    assert family(**change) == "weft"
