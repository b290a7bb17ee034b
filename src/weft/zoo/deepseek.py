"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, and experts after a few dense layers."""

from collections.abc import Collection, Mapping
from typing import Any

from weft.spec import MTP, Block, Experts, Gated, LatentAttention, ModelSpec, RMSNorm, Rope, YarnScaling
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import outer_rules, read_layers, read_sizes
from weft.zoo.experts import experts_rules, gated_rules
from weft.zoo.family import Entry, Family, Inexpressible, fold
from weft.zoo.rope import read_rope, write_rope
from weft.zoo.rules import Alias, Cat, Copy, Drop, Interleave, One, Rule, Source, copy

# What the published configs hold besides: how training balanced experts, and where the original code lies.
_TRAINING = ("aux_loss_alpha", "seq_aux", "ep_size", "auto_map")


def from_v2(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ("DeepseekV2ForCausalLM", "DeepseekV2Model"))
    reader.only("mlp_bias", False)
    reader.only("scoring_func", "softmax")
    reader.only("norm_topk_prob", False)
    method = reader.get("topk_method", "greedy")
    reader.only("topk_method", "greedy", "group_limited_greedy")
    groups: dict[str, Any] = {}
    if method == "group_limited_greedy":
        groups = {"groups": reader.integer("n_group"), "top_groups": reader.integer("topk_group")}
    reader.get("n_group"), reader.get("topk_group")
    routing = {"normalise": False, "scale": reader.number("routed_scaling_factor", 1.0), **groups}
    return _from_config(reader, routing, context=2048, dense=0, experts=64, shared=2, top_k=None, hidden=1407)


def from_v3(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ("DeepseekV3ForCausalLM", "DeepseekV3Model"))
    reader.only("scoring_func", "sigmoid")
    reader.only("topk_method", "noaux_tc")
    reader.only("rope_interleave", True)
    routing = {
        "score": "sigmoid",
        "choice_bias": True,
        "group_score": "top2",
        "groups": reader.integer("n_group", 8),
        "top_groups": reader.integer("topk_group", 4),
        "normalise": reader.flag("norm_topk_prob", True),
        "scale": reader.number("routed_scaling_factor", 2.5),
    }
    depth = _read_count(reader, "num_mtp_layers", _read_count(reader, "num_nextn_predict_layers", 0))
    return _from_config(
        reader, routing, mtp=MTP(depth=depth) if depth else None, context=4096, dense=3, experts=256, shared=1, top_k=8, hidden=2048
    )


def _from_config(
    reader: ConfigReader,
    routing: dict[str, Any],
    context: int,
    dense: int,
    experts: int,
    shared: int,
    top_k: int | None,
    hidden: int,
    mtp: MTP | None = None,
) -> ModelSpec:
    """What both versions share; the numbers are the defaults of transformers' config classes."""
    sizes = read_sizes(reader, context, tied_default=False)
    mixer = _read_mixer(reader, read_rope(reader, sizes["context"], sharpens=True))
    activation = reader.activation("hidden_act", "silu")
    layers = read_layers(reader)
    first = _read_count(reader, "first_k_dense_replace", dense)
    reader.only("moe_layer_freq", 1)
    reader.only("pretraining_tp", 1, remedy="other values split the same products: set it to 1")
    gated = Gated(hidden=reader.integer("intermediate_size"), activation=activation)
    channel = Experts(
        experts=reader.integer("n_routed_experts", experts),
        top_k=reader.integer("num_experts_per_tok", top_k),
        hidden=reader.integer("moe_intermediate_size", hidden),
        shared=reader.integer("n_shared_experts", shared),
        activation=activation,
        **routing,
    ) if first < layers else gated  # fmt: skip
    for key in (*_TRAINING, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"):
        reader.get(key)
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6))
    blocks = [Block(mixer=mixer, channel=gated if i < first else channel) for i in range(layers)]
    reader.finish()
    return ModelSpec(**sizes, norm=norm, layers=fold(blocks), mtp=mtp)


def _read_count(reader: ConfigReader, key: str, default: int) -> int:
    value = reader.get(key, default)
    return 0 if value == 0 and not isinstance(value, bool) else reader.integer(key, default)


def _read_mixer(reader: ConfigReader, rope: Rope) -> LatentAttention:
    heads, nope, rotated = (
        reader.integer("num_attention_heads"),
        reader.integer("qk_nope_head_dim", 128),
        reader.integer("qk_rope_head_dim", 64),
    )
    reader.only("num_key_value_heads", heads, remedy="every head has keys and values of its own, made from the latent")
    reader.only("attention_bias", False)
    reader.only("head_dim", rotated)
    reader.only("qk_head_dim", nope + rotated)
    q_rank = reader.given("q_lora_rank", 1536)
    return LatentAttention(
        heads=heads,
        kv_rank=reader.integer("kv_lora_rank", 512),
        q_rank=None if q_rank is None else reader.integer("q_lora_rank", q_rank),
        nope_head_dim=nope,
        rope_head_dim=rotated,
        v_head_dim=reader.integer("v_head_dim", 128),
        rope=rope,
    )


def to_v2(spec: ModelSpec) -> dict[str, Any]:
    config, experts = _to_config(spec)
    if experts is not None:
        config |= {
            "topk_method": "greedy" if experts.groups == 1 else "group_limited_greedy",
            "n_group": experts.groups,
            "topk_group": experts.top_groups,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": experts.scale,
        }
    return config


def to_v3(spec: ModelSpec) -> dict[str, Any]:
    config, experts = _to_config(spec)
    if experts is not None:
        config |= {
            "topk_method": "noaux_tc",
            "n_group": experts.groups,
            "topk_group": experts.top_groups,
            "scoring_func": "sigmoid",
            "norm_topk_prob": experts.normalise,
            "routed_scaling_factor": experts.scale,
        }
    if spec.mtp is not None and spec.mtp.type != "sequential":
        raise Inexpressible
    return config | {"rope_interleave": True, "num_nextn_predict_layers": spec.mtp.depth if spec.mtp else 0}


def _to_config(spec: ModelSpec) -> tuple[dict[str, Any], Experts | None]:
    blocks = spec.blocks()
    mixer, last = blocks[-1].mixer, blocks[-1].channel
    experts = last if isinstance(last, Experts) else None
    dense = [block.channel for block in blocks if isinstance(block.channel, Gated)]
    if not isinstance(mixer, LatentAttention) or not isinstance(spec.norm, RMSNorm) or spec.dim % mixer.heads:
        raise Inexpressible  # DeepseekV2Config refuses a width that the heads do not divide
    config: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.heads,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm.eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.dropout.attention,
        "attention_bias": False,
        "q_lora_rank": mixer.q_rank,
        "kv_lora_rank": mixer.kv_rank,
        "qk_nope_head_dim": mixer.nope_head_dim,
        "qk_rope_head_dim": mixer.rope_head_dim,
        "v_head_dim": mixer.v_width,
        **write_rope(mixer.rope),
        "first_k_dense_replace": len(dense),
        "moe_layer_freq": 1,
        "intermediate_size": dense[0].hidden if dense else 4 * spec.dim,
    }
    channel = experts or (dense[0] if dense else None)
    if channel is None:
        raise Inexpressible
    config["hidden_act"] = activation_name(channel.activation, ACTIVATIONS)
    if experts is not None:
        config |= {
            "n_routed_experts": experts.experts,
            "n_shared_experts": experts.shared,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.hidden,
        }
    return config, experts


def rules(spec: ModelSpec) -> list[Rule]:
    """The weight map of both versions."""
    rows = outer_rules(spec)
    for i, block in enumerate(spec.blocks()):
        rows += block_rules(f"model.layers.{i}", f"blocks.{i}", block)
    return rows


def v3_rules(spec: ModelSpec) -> list[Rule]:
    """With the modules for multi-token prediction, which stand after the last layer and repeat the tensors they share with the model.

    Where the spec has none, a file may hold one all the same.
    """
    modules = [_module_rules(spec, k) for k in range(spec.mtp.depth if spec.mtp else 1)]
    if spec.mtp is None:
        return rules(spec) + [Drop(name) for row in modules[0] for name in _names(row)]
    return rules(spec) + [row for module in modules for row in module]


def _module_rules(spec: ModelSpec, k: int) -> list[Rule]:
    theirs, ours = f"model.layers.{len(spec.blocks()) + k}", f"mtp.{k}"
    embedding, output = "model.embed_tokens.weight", "model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight"
    cause = "a model shares both with its modules for multi-token prediction; set num_nextn_predict_layers to 0 to do without these"
    return [
        *(copy(f"{theirs}.{name}.weight", f"{ours}.{name}.weight") for name in ("enorm", "hnorm", "eh_proj")),
        *block_rules(theirs, f"{ours}.block", spec.blocks()[-1]),
        copy(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight"),
        Alias(f"{theirs}.embed_tokens.weight", of=embedding, written=True, cause=cause),
        Alias(f"{theirs}.shared_head.head.weight", of=output, written=True, cause=cause),
    ]


def _names(row: Rule) -> list[str]:
    """The names of a row in the file."""
    if isinstance(row, Drop | Alias):
        return [row.name]
    return [source.name for source in ((row.source,) if isinstance(row, One) else row.sources)]


def held(spec: ModelSpec, names: Collection[str]) -> ModelSpec:
    """Without multi-token prediction where the file has no module at all: transformers keeps the config's promise and drops the tensors."""
    first = f"layers.{len(spec.blocks())}."
    if spec.mtp is None or any(name.removeprefix("model.").startswith(first) for name in names):
        return spec
    return ModelSpec.model_validate({**spec.model_dump(), "mtp": None})


def block_rules(theirs: str, ours: str, block: Block) -> list[Rule]:
    """One layer, whose names begin with `theirs` in the file and `ours` in the model."""
    assert isinstance(block.mixer, LatentAttention)
    rows: list[Rule] = [copy(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")]
    rows += _mixer_rules(f"{theirs}.self_attn", f"{ours}.mixer", block.mixer)
    rows.append(copy(f"{theirs}.post_attention_layernorm.weight", f"{ours}.channel_norm.weight"))
    if isinstance(block.channel, Experts):
        return rows + experts_rules(theirs, f"{ours}.channel", block.channel)
    assert isinstance(block.channel, Gated)
    return rows + gated_rules(f"{theirs}.mlp", f"{ours}.channel", block.channel.hidden)


def _mixer_rules(theirs: str, ours: str, mixer: LatentAttention) -> list[Rule]:
    """Rotated pairs are neighbours in the file: after the plain channels of each head's queries, and after the latent's rows."""
    queries, latent, shared = mixer.down_rows()
    compressed = mixer.q_rank is not None
    turned = Interleave(f"{theirs}.{'q_b_proj' if compressed else 'q_proj'}.weight", mixer.heads, plain=mixer.nope_head_dim)
    first: Source = Copy(f"{theirs}.q_a_proj.weight") if compressed else turned
    down = (first, Interleave(f"{theirs}.kv_a_proj_with_mqa.weight", 1, plain=latent))
    rows: list[Rule] = [
        Cat(f"{ours}.down.weight", down, (queries, latent + shared)),
        copy(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight"),
        copy(f"{theirs}.kv_b_proj.weight", f"{ours}.kv_up"),
        copy(f"{theirs}.o_proj.weight", f"{ours}.out.weight"),
    ]
    if compressed:
        rows += [One(f"{ours}.q_up.weight", turned), copy(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_norm.weight")]
    return rows


V2 = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    classifier="DeepseekV2ForSequenceClassification",
    prefix="model.",
    from_config=from_v2,
    to_config=to_v2,
    rules=rules,
)
V3 = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    classifier="DeepseekV3ForSequenceClassification",
    prefix="model.",
    from_config=from_v3,
    to_config=to_v3,
    rules=v3_rules,
    held=held,
)


def build(
    size: tuple[int, int, int, int],
    dense: tuple[int, int],
    experts: Experts,
    q_rank: int | None,
    vocab: int,
    mscale: float,
    mtp: MTP | None = None,
) -> ModelSpec:
    """A DeepSeek of size (dim, layers, heads, context), its `dense` first layers (how many, hidden), all others with `experts`."""
    dim, layers, heads, context = size
    yarn = YarnScaling(factor=40.0, original_context=4096, attention_factor=1.0, mscale_all_dim=mscale)
    mixer = LatentAttention(
        heads=heads, kv_rank=512, q_rank=q_rank, nope_head_dim=128, rope_head_dim=64, v_head_dim=128, rope=Rope(scaling=yarn)
    )
    blocks = (
        Block(repeat=dense[0], mixer=mixer, channel=Gated(hidden=dense[1])),
        Block(repeat=layers - dense[0], mixer=mixer, channel=experts),
    )
    return ModelSpec(vocab=vocab, dim=dim, context=context, norm=RMSNorm(eps=1e-6), tie_embeddings=False, layers=blocks, mtp=mtp)


def v2_lite() -> ModelSpec:
    experts = Experts(experts=64, top_k=6, hidden=1408, shared=2, normalise=False)
    return build((2048, 27, 16, 163840), (1, 10944), experts, None, 102400, 0.707)


def v2() -> ModelSpec:
    experts = Experts(experts=160, top_k=6, hidden=1536, shared=2, normalise=False, groups=8, top_groups=3, scale=16.0)
    return build((5120, 60, 128, 163840), (1, 12288), experts, 1536, 102400, 1.0)


def v3() -> ModelSpec:
    experts = Experts(
        experts=256, top_k=8, hidden=2048, shared=1, score="sigmoid", scale=2.5, groups=8, top_groups=4, group_score="top2",
        choice_bias=True,
    )  # fmt: skip
    return build((7168, 61, 128, 163840), (3, 18432), experts, 1536, 129280, 1.0, MTP(depth=1))


ENTRIES = (
    Entry(
        "deepseek-v2-lite", "deepseek_v2", v2_lite, 15_706_484_224, "tensor index of the Hugging Face repo", "deepseek-ai/DeepSeek-V2-Lite"
    ),
    Entry("deepseek-v2", "deepseek_v2", v2, 235_741_434_880, "tensor index of the Hugging Face repo", "deepseek-ai/DeepSeek-V2"),
    Entry("deepseek-v3", "deepseek_v3", v3, 671_000_000_000, "DeepSeek-AI 2024b, section 4.2", "deepseek-ai/DeepSeek-V3"),
)
