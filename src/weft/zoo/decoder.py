"""What Llama, Mistral, Qwen and Gemma share in Hugging Face: the config's body and the names of their tensors."""

from typing import Any

from weft.spec import Attention, Block, Dropout, Experts, Gated, ModelSpec, RMSNorm
from weft.zoo.config import ConfigReader
from weft.zoo.experts import COMMON, Names, experts_rules, gated_rules
from weft.zoo.family import Inexpressible
from weft.zoo.rope import write_rope
from weft.zoo.rules import Cat, Copy, Drop, Rule, copy, head


def read_heads(reader: ConfigReader, kv_default: int | None, width_default: int | None = None) -> dict[str, Any]:
    """heads, kv_heads and head_dim of an attention spec, with the family's defaults for what a config leaves out."""
    heads = reader.integer("num_attention_heads")
    groups = reader.given("num_key_value_heads", kv_default)
    width = reader.given("head_dim", width_default)
    return {
        "heads": heads,
        "kv_heads": None if groups is None else reader.integer("num_key_value_heads", groups),
        "head_dim": width_default if width is None else reader.integer("head_dim", width),
    }


def read_sizes(reader: ConfigReader, context_default: int, tied_default: bool) -> dict[str, Any]:
    """The model-level sizes of a spec, without its layers."""
    return {
        "vocab": reader.integer("vocab_size"),
        "dim": reader.integer("hidden_size"),
        "context": reader.integer("max_position_embeddings", context_default),
        "tie_embeddings": reader.flag("tie_word_embeddings", tied_default),
        "dropout": Dropout(attention=reader.number("attention_dropout", 0.0)),
    }


def layer_windows(reader: ConfigReader, layers: int, window: int | None, default: list[bool]) -> list[int | None]:
    """The window of each layer by `layer_types`, or by `default` (True where sliding) for configs that list none."""
    kinds = reader.get("layer_types")
    if kinds is None:
        sliding = default
    else:
        if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise reader.refuse("layer_types", f"it must list full_attention or sliding_attention for each of {layers} layers.")
        sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and window is None:
        raise reader.refuse("layer_types", "layers slide but no sliding_window is in use; give one, or make them full_attention.")
    return [window if slides else None for slides in sliding]


def read_layers(reader: ConfigReader, key: str = "num_hidden_layers") -> int:
    """How many layers; beyond a limit that no model comes near, a number is a mistake."""
    return reader.integer(key, most=10_000)


def write_body(spec: ModelSpec, mixer: Attention, hidden: int) -> dict[str, Any]:
    """The config keys that all these families have, from a spec, the mixer of its first layer and the channels of a unit's inside."""
    if mixer.rope is None or not isinstance(spec.norm, RMSNorm):
        raise Inexpressible
    config: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "intermediate_size": hidden,
        "num_hidden_layers": len(spec.blocks()),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm.eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.dropout.attention,
        **write_rope(mixer.rope),
    }
    if spec.dim % mixer.heads or mixer.width(spec.dim) != spec.dim // mixer.heads:
        config["head_dim"] = mixer.width(spec.dim)
    return config


def layer_types(sliding: list[int | None]) -> tuple[list[str], int | None]:
    """`layer_types` and the one window of all sliding layers; raises Inexpressible where windows differ."""
    sizes = {window for window in sliding if window is not None}
    if len(sizes) > 1:
        raise Inexpressible
    return ["full_attention" if window is None else "sliding_attention" for window in sliding], next(iter(sizes), None)


LLAMA_NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "channel_norm"}


def decoder_rules(spec: ModelSpec, norms: dict[str, str], experts: Names = COMMON) -> list[Rule]:
    """The weight map of a Llama-like model; `norms` maps layer norms' names in the file to ours, `experts` has its words for experts."""
    rows = outer_rules(spec)
    for i, block in enumerate(spec.blocks()):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        rows += _layer(theirs, ours, block, spec.dim, norms)
        if isinstance(block.channel, Experts):
            rows += experts_rules(theirs, f"{ours}.channel", block.channel, experts)
    return rows


def outer_rules(spec: ModelSpec) -> list[Rule]:
    """What stands around the layers: embedding, last norm and head."""
    embedding = "model.embed_tokens.weight"
    return [
        copy(embedding, "embed.weight"),
        copy("model.norm.weight", "norm.weight"),
        head(spec.tie_embeddings, "lm_head.weight", embedding),
    ]


def _layer(theirs: str, ours: str, block: Block, dim: int, norms: dict[str, str]) -> list[Rule]:
    mixer, channel = block.mixer, block.channel
    assert isinstance(mixer, Attention)
    width = mixer.width(dim)
    sizes = (mixer.heads * width, mixer.num_kv_heads * width, mixer.num_kv_heads * width)
    attention = f"{theirs}.self_attn"

    def qkv(kind: str) -> Cat:
        return Cat(f"{ours}.mixer.qkv.{kind}", tuple(Copy(f"{attention}.{p}_proj.{kind}") for p in "qkv"), sizes)

    rows: list[Rule] = [copy(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight") for name, norm in norms.items()]
    rows += [qkv("weight"), copy(f"{attention}.o_proj.weight", f"{ours}.mixer.out.weight")]
    if isinstance(channel, Gated):
        rows += gated_rules(f"{theirs}.mlp", f"{ours}.channel", channel.hidden, channel.bias)
    if mixer.qkv_bias:
        rows.append(qkv("bias"))
    if mixer.out_bias:
        rows.append(copy(f"{attention}.o_proj.bias", f"{ours}.mixer.out.bias"))
    if mixer.qk_norm is not None:
        rows += [copy(f"{attention}.{p}_norm.weight", f"{ours}.mixer.{p}_norm.weight") for p in "qk"]
    return [*rows, Drop(f"{attention}.rotary_emb.inv_freq")]
