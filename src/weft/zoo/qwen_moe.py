"""Qwen 3 with experts (Qwen Team 2025): 128 small ones a layer, of which a token is sent to eight, and none shared."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import Attention, Block, Experts, Gated, ModelSpec, RMSNorm, Rope
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import LLAMA_NORMS, decoder_rules, read_heads, read_layers, read_sizes, write_body
from weft.zoo.family import Entry, Family, Inexpressible, fold
from weft.zoo.rope import read_rope

ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen3MoeModel")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    """Layers are dense where `mlp_only_layers` lists them, and where they do not fall on `decoder_sparse_step`."""
    reader = ConfigReader(config, ARCHITECTURES)
    sizes = read_sizes(reader, context_default=32768, tied_default=False)
    norm, bias = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6)), reader.flag("attention_bias", False)
    window = reader.given("sliding_window", 4096) if reader.flag("use_sliding_window", False) else None
    reader.get("sliding_window")
    reader.get("max_window_layers")  # every layer slides or none does
    mixer = Attention(
        **read_heads(reader, kv_default=4),
        rope=read_rope(reader, sizes["context"]),
        window=window,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=norm,
    )
    activation = reader.activation("hidden_act", "silu")
    number = "num_local_experts" if reader.get("num_experts") is None else "num_experts"  # published files have the second
    experts = Experts(
        experts=reader.integer(number, 128),
        top_k=reader.integer("num_experts_per_tok", 8),
        hidden=reader.integer("moe_intermediate_size", 768),
        activation=activation,
        normalise=reader.flag("norm_topk_prob", False),
    )
    dense = Gated(hidden=reader.integer("intermediate_size", 6144), activation=activation)
    step, layers, listed = reader.integer("decoder_sparse_step", 1), read_layers(reader), reader.get("mlp_only_layers", [])
    if not isinstance(listed, list) or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < layers for i in listed):
        raise reader.refuse("mlp_only_layers", f"it must list layers from 0 to {layers - 1}.")
    reader.get("router_aux_loss_coef")  # how to train is the recipe's affair
    blocks = [Block(mixer=mixer, channel=dense if i in listed or (i + 1) % step else experts) for i in range(layers)]
    reader.finish()
    return ModelSpec(**sizes, norm=norm, layers=fold(blocks))


def to_config(spec: ModelSpec) -> dict[str, Any]:
    blocks = spec.blocks()
    mixer = blocks[0].mixer
    experts = [block.channel for block in blocks if isinstance(block.channel, Experts)]
    dense = {i: block.channel for i, block in enumerate(blocks) if isinstance(block.channel, Gated)}
    if not isinstance(mixer, Attention) or not experts or len(experts) + len(dense) < len(blocks):
        raise Inexpressible
    channel = experts[0]
    if channel.shared or channel.choice_bias:
        raise Inexpressible
    hidden = next(iter(dense.values())).hidden if dense else channel.hidden
    return {
        **write_body(spec, mixer, hidden),
        "head_dim": mixer.width(spec.dim),
        "hidden_act": activation_name(channel.activation, ACTIVATIONS),
        "attention_bias": mixer.out_bias,
        "use_sliding_window": mixer.window is not None,
        "sliding_window": mixer.window,
        "num_experts": channel.experts,
        "num_experts_per_tok": channel.top_k,
        "moe_intermediate_size": channel.hidden,
        "norm_topk_prob": channel.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense),
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    classifier="Qwen3MoeForSequenceClassification",
    prefix="model.",
    from_config=from_config,
    to_config=to_config,
    rules=partial(decoder_rules, norms=LLAMA_NORMS),
)


def qwen3_moe(size: tuple[int, int, int, int]) -> ModelSpec:
    """Qwen 3 with 128 experts, of size (dim, layers, heads, hidden of an expert); heads are always 128 wide."""
    dim, layers, heads, hidden = size
    norm = RMSNorm(eps=1e-6)
    mixer = Attention(heads=heads, kv_heads=4, head_dim=128, rope=Rope(base=1000000.0), qk_norm=norm)
    block = Block(repeat=layers, mixer=mixer, channel=Experts(experts=128, top_k=8, hidden=hidden))
    return ModelSpec(vocab=151936, dim=dim, context=40960, norm=norm, tie_embeddings=False, layers=(block,))


_INDEX = "tensor index of the Hugging Face repo"

ENTRIES = (
    Entry("qwen3-30b-a3b", "qwen3_moe", partial(qwen3_moe, (2048, 48, 32, 768)), 30_532_122_624, _INDEX, "Qwen/Qwen3-30B-A3B"),
    Entry("qwen3-235b-a22b", "qwen3_moe", partial(qwen3_moe, (4096, 94, 64, 1536)), 235_093_634_560, _INDEX, "Qwen/Qwen3-235B-A22B"),
)
