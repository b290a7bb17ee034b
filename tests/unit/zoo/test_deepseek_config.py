"""DeepSeek's published config.json files, what is counted from them, and what is refused."""

import math
from typing import Any

import pytest
from test_config import WEIRD, spec_of

from weft.errors import UserError
from weft.spec import MTP, Attention, Experts, LatentAttention, ModelSpec
from weft.zoo import ENTRIES, FAMILIES, describe, family_of, from_config

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
BOTH = {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_layer_freq": 1,
    "num_experts_per_tok": 8, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "seq_aux": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
}  # fmt: skip
V2_LITE = {
    **BOTH, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "auto_map": {"AutoConfig": "a.B"},
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
}  # fmt: skip
V3 = {
    **BOTH, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
}  # fmt: skip


@pytest.mark.parametrize(("config", "name"), [(V2_LITE, "deepseek-v2-lite"), (V3, "deepseek-v3")])
def test_published_configs_are_the_entries(config: dict[str, Any], name: str) -> None:
    assert from_config(config) == (FAMILIES[ENTRIES[name].family], ENTRIES[name].spec)


@pytest.mark.parametrize(
    ("name", "total", "active", "without_input"),
    [("deepseek-v2-lite", 15.7e9, None, 2.4e9), ("deepseek-v2", 236e9, 21e9, None), ("deepseek-v3", 671e9, 37e9, 36.6e9)],
)
def test_counts_are_the_published_ones(name: str, total: float, active: float | None, without_input: float | None) -> None:
    """V2-Lite's 2.4B are 2.45B without the input embedding, as V3's 36.6B are, and 2.66B with it: cut, not rounded."""
    spec = ENTRIES[name].spec
    assert spec.num_params() == pytest.approx(total, rel=0.01)
    counted = spec.num_params(active=True)
    assert active is None or counted == pytest.approx(active, rel=0.02)
    assert without_input is None or counted - spec.vocab * spec.dim == pytest.approx(without_input, rel=0.025)


def test_yarn_scales_scores_by_mscale_all_dim() -> None:
    """0.1 * 0.707 * ln 40 + 1 = 1.2608, squared 1.5896; cosines and sines keep their length."""
    mixer = spec_of(V2_LITE).blocks()[0].mixer
    assert isinstance(mixer, LatentAttention)
    assert mixer.rope.score_factor == pytest.approx(1.5896, abs=1e-4)
    assert mixer.scale == pytest.approx(1.5896 / math.sqrt(192), abs=1e-4)
    assert mixer.rope.scaling.attention_factor == 1.0
    llama = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    plain = spec_of({**llama, "intermediate_size": 8, "rope_scaling": V2_LITE["rope_scaling"]}).blocks()[0].mixer
    assert isinstance(plain, Attention)
    assert plain.rope.score_factor == 1.0, "other families use the two for cosines and sines alone"


@pytest.mark.parametrize("scaling", [{"mscale_all_dim": 0.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"attention_factor": 1.2}, {}])
def test_yarns_factors_survive_writing(scaling: dict[str, float]) -> None:
    spec = spec_of(V3, rope_scaling={**YARN, **scaling})
    family, config = describe(spec)
    assert family.name == "deepseek_v3"
    assert spec_of({"model_type": "deepseek_v3", **config}).blocks()[0].mixer == spec.blocks()[0].mixer


def test_how_experts_are_kept_busy_does_not_change_the_family() -> None:
    spec = ENTRIES["deepseek-v3"].spec
    data = spec.model_dump()
    for layer in data["layers"]:
        if layer["channel"]["type"] == "experts":
            layer["channel"] |= {"balance_loss": 0.01, "z_loss": 0.001, "bias_speed": 0.1}
    assert family_of(ModelSpec.model_validate(data)).name == "deepseek_v3"
    data["layers"][-1]["channel"]["choice_bias"] = False
    assert family_of(ModelSpec.model_validate(data)).name == "weft", "control: what changes the model does"
    independent = {**spec.model_dump(), "mtp": MTP(type="independent")}
    assert family_of(ModelSpec.model_validate(independent)).name == "weft"


def test_dense_latent_attention_has_a_family_too() -> None:
    spec = ENTRIES["deepseek-v2-lite"].spec
    dense = {**spec.model_dump(), "layers": [{**spec.model_dump()["layers"][0], "repeat": 4}]}
    assert family_of(ModelSpec.model_validate(dense)).name == "deepseek_v2"


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (V2_LITE, {"scoring_func": "sigmoid"}, ["scoring_func", "softmax"]),
        (V2_LITE, {"norm_topk_prob": True}, ["norm_topk_prob", "False"]),
        (V2_LITE, {"topk_method": "noaux_tc"}, ["topk_method", "greedy"]),
        (V2_LITE, {"topk_method": "group_limited_greedy", "n_group": 7}, ["64 experts", "7 groups"]),
        (V2_LITE, {"num_experts_per_tok": None}, ["num_experts_per_tok", "missing"]),
        (V2_LITE, {"num_experts_per_tok": 65}, ["top_k is 65", "64 experts"]),
        (V2_LITE, {"attention_bias": True}, ["attention_bias", "False"]),
        (V2_LITE, {"moe_layer_freq": 2}, ["moe_layer_freq"]),
        (V2_LITE, {"num_key_value_heads": 4}, ["num_key_value_heads", "16", "latent"]),
        (V3, {"first_k_dense_replace": -1}, ["first_k_dense_replace"]),
        (V3, {"rope_interleave": False}, ["rope_interleave", "True"]),
        (V3, {"qk_rope_head_dim": 63}, ["rope_head_dim is 63", "even"]),
        (V3, {"topk_group": 9}, ["top_groups is 9", "8 groups"]),
        (V3, {"rope_scaling": {**YARN, "mscale_all_dim": -1.0}}, ["mscale_all_dim", "positive"]),
        (V3, {"num_nextn_predict_layers": "two"}, ["num_nextn_predict_layers", "integer"]),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_weft_would_compute_differently_is_refused_by_name(config: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        spec_of(config, **change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("config", [V2_LITE, V3], ids=lambda config: config["model_type"])
def test_no_value_of_any_key_does_more_than_be_refused(config: dict[str, Any]) -> None:
    messages = []
    for key in {*config, "num_mtp_layers", "head_dim", "rope_parameters"}:
        for value in WEIRD:
            try:
                assert isinstance(spec_of(config, **{key: value}).blocks()[-1].channel, Experts) or key in (
                    "first_k_dense_replace",
                    "num_hidden_layers",
                )
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert max(map(len, messages)) < 900


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_the_weight_map_names_every_tensor_once(name: str) -> None:
    rules = FAMILIES[ENTRIES[name].family].rules(ENTRIES[name].spec)
    ours = [rule.ours for rule in rules if hasattr(rule, "ours")]
    assert len(ours) == len(set(ours))
    assert all(each.startswith(("embed", "blocks.", "norm", "head", "mtp.")) for each in ours)
