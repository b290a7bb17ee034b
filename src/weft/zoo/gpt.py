"""GPT-1 (Radford et al. 2018), GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020).

GPT-3 is GPT-2 at other sizes, but that "alternating dense and locally banded sparse attention patterns" take turns in its layers (section
2.1). Entries called gpt3-SIZE are dense throughout, as everybody rebuilds them; gpt3-SIZE-sparse alternate. How wide the bands are was
not published: `BAND` is GPT-Neo's window at the same context.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import MLP, Attention, Block, Dropout, LayerNorm, Learned, ModelSpec
from weft.spec.activations import Activation
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import read_layers
from weft.zoo.family import Entry, Family, Inexpressible, first_parts, fold
from weft.zoo.rules import Drop, Rule, copy, head, transpose

# OpenAI's own word: GPT-1's "gelu" is the tanh form.
GPT1_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


def from_gpt1(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ("OpenAIGPTLMHeadModel", "OpenAIGPTModel"))
    dim = reader.integer("n_embd")
    channel = MLP(hidden=4 * dim, activation=reader.activation("afn", "gelu", GPT1_ACTIVATIONS))
    return _from_config(reader, "post", Attention(heads=reader.integer("n_head"), qkv_bias=True, out_bias=True), channel, 512)


def from_gpt2(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ("GPT2LMHeadModel", "GPT2Model"))
    dim = reader.integer("n_embd")
    channel = MLP(hidden=reader.integer("n_inner", 4 * dim), activation=reader.activation("activation_function", "gelu_new"))
    scale = None if reader.flag("scale_attn_weights", True) else 1.0
    reader.only("scale_attn_by_inverse_layer_idx", False)
    reader.get("reorder_and_upcast_attn")  # the same function, rounded differently in half precision
    return _from_config(reader, "pre", Attention(heads=reader.integer("n_head"), qkv_bias=True, out_bias=True, scale=scale), channel, 1024)


def _from_config(reader: ConfigReader, topology: str, mixer: Attention, channel: MLP, positions: int) -> ModelSpec:
    length = reader.integer("n_positions", positions)
    block = Block.model_validate({"topology": topology, "repeat": read_layers(reader, "n_layer"), "mixer": mixer, "channel": channel})
    dropout = Dropout(
        embed=reader.number("embd_pdrop", 0.1), attention=reader.number("attn_pdrop", 0.1), residual=reader.number("resid_pdrop", 0.1)
    )
    norm = LayerNorm(eps=reader.number("layer_norm_epsilon", 1e-5))
    vocab, dim, context = reader.integer("vocab_size"), reader.integer("n_embd"), reader.integer("n_ctx", length)
    tied = reader.flag("tie_word_embeddings", True)
    reader.finish()
    return ModelSpec(
        vocab=vocab,
        dim=dim,
        context=context,
        norm=norm,
        position=Learned(length=length),
        tie_embeddings=tied,
        final_norm=topology == "pre",
        dropout=dropout,
        layers=(block,),
    )


def to_gpt1(spec: ModelSpec) -> dict[str, Any]:
    config, _, channel = _to_config(spec, "post")
    if channel.activation not in GPT1_ACTIVATIONS.values():
        raise Inexpressible
    return {**config, "afn": activation_name(channel.activation, GPT1_ACTIVATIONS)}


def to_gpt2(spec: ModelSpec) -> dict[str, Any]:
    config, mixer, channel = _to_config(spec, "pre")
    return {
        **config,
        "n_inner": channel.hidden,
        "activation_function": activation_name(channel.activation, {"gelu_new": "gelu_tanh", **ACTIVATIONS}),
        "scale_attn_weights": mixer.scale != 1.0,
    }


def _to_config(spec: ModelSpec, topology: str) -> tuple[dict[str, Any], Attention, MLP]:
    mixer, channel = first_parts(spec, topology, Attention, MLP)
    if not isinstance(spec.norm, LayerNorm) or not isinstance(spec.position, Learned):
        raise Inexpressible
    config = {
        "vocab_size": spec.vocab,
        "n_positions": spec.position.length,
        "n_ctx": spec.context,
        "n_embd": spec.dim,
        "n_layer": len(spec.blocks()),
        "n_head": mixer.heads,
        "layer_norm_epsilon": spec.norm.eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "embd_pdrop": spec.dropout.embed,
        "attn_pdrop": spec.dropout.attention,
        "resid_pdrop": spec.dropout.residual,
    }
    return config, mixer, channel


def gpt1_rules(spec: ModelSpec) -> list[Rule]:
    embedding = "transformer.tokens_embed.weight"
    rows: list[Rule] = [copy(embedding, "embed.weight"), copy("transformer.positions_embed.weight", "position.weight")]
    return [*rows, head(spec.tie_embeddings, "lm_head.weight", embedding), *_layers(spec)]


def gpt2_rules(spec: ModelSpec) -> list[Rule]:
    embedding = "transformer.wte.weight"
    rows: list[Rule] = [copy(embedding, "embed.weight"), copy("transformer.wpe.weight", "position.weight")]
    rows += [copy(f"transformer.ln_f.{kind}", f"norm.{kind}") for kind in ("weight", "bias")]
    return [*rows, head(spec.tie_embeddings, "lm_head.weight", embedding), *_layers(spec)]


def _layers(spec: ModelSpec) -> list[Rule]:
    """GPT-1 and GPT-2 name the tensors of a layer alike; their linear layers are Conv1D, so matrices lie transposed."""
    linears = {"attn.c_attn": "mixer.qkv", "attn.c_proj": "mixer.out", "mlp.c_fc": "channel.up", "mlp.c_proj": "channel.down"}
    norms = {"ln_1": "mixer_norm", "ln_2": "channel_norm"}
    rows: list[Rule] = []
    for i in range(len(spec.blocks())):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        for name, linear in linears.items():
            rows.append(transpose(f"{theirs}.{name}.weight", f"{ours}.{linear}.weight"))
            rows.append(copy(f"{theirs}.{name}.bias", f"{ours}.{linear}.bias"))
        rows += [copy(f"{theirs}.{name}.{kind}", f"{ours}.{norm}.{kind}") for name, norm in norms.items() for kind in ("weight", "bias")]
        rows += [Drop(f"{theirs}.attn.bias"), Drop(f"{theirs}.attn.masked_bias")]
    return rows


GPT1 = Family(
    name="gpt",
    model_type="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    classifier="OpenAIGPTForSequenceClassification",
    prefix="transformer.",
    from_config=from_gpt1,
    to_config=to_gpt1,
    rules=gpt1_rules,
)
GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    prefix="transformer.",
    from_config=from_gpt2,
    to_config=to_gpt2,
    rules=gpt2_rules,
)


def gpt1() -> ModelSpec:
    mixer = Attention(heads=12, qkv_bias=True, out_bias=True)
    block = Block(topology="post", repeat=12, mixer=mixer, channel=MLP(hidden=3072))
    return ModelSpec(vocab=40478, dim=768, context=512, position=Learned(length=512), final_norm=False, dropout=_DROPOUT, layers=(block,))


def gpt2(dim: int, layers: int, heads: int, context: int = 1024, band: int | None = None) -> ModelSpec:
    """GPT-2 of this size; with a `band` every second layer, the first being dense, sees that many tokens only (GPT-3)."""
    dense = Block(mixer=Attention(heads=heads, qkv_bias=True, out_bias=True), channel=MLP(hidden=4 * dim))
    banded = Block(mixer=Attention(heads=heads, qkv_bias=True, out_bias=True, window=band), channel=MLP(hidden=4 * dim))
    blocks = fold([banded if i % 2 else dense for i in range(layers)])
    return ModelSpec(vocab=50257, dim=dim, context=context, position=Learned(length=context), dropout=_DROPOUT, layers=blocks)


BAND = 256
_DROPOUT = Dropout(embed=0.1, attention=0.1, residual=0.1)
_README = "parameter counts as corrected in the README of OpenAI's gpt-2 repository"
_TABLE = "Brown et al. 2020, table 2.1"


_GPT3 = {
    "small": (768, 12, 12, 125_000_000),
    "medium": (1024, 24, 16, 350_000_000),
    "large": (1536, 24, 16, 760_000_000),
    "xl": (2048, 24, 16, 1_300_000_000),
    "2.7b": (2560, 32, 32, 2_700_000_000),
    "6.7b": (4096, 32, 32, 6_700_000_000),
    "13b": (5120, 40, 40, 13_000_000_000),
    "175b": (12288, 96, 96, 175_000_000_000),
}
_MISPRINTS = {
    "xl": "the table prints 24 heads of 128, which is 3072 and not d_model 2048; 16 heads of 128 fit",
    "13b": "the table prints d_model 5140, but 40 heads of 128 are 5120",
}


def _gpt3(band: int | None) -> tuple[Entry, ...]:
    family, suffix = ("gpt2", "") if band is None else ("weft", "-sparse")
    return tuple(
        Entry(
            f"gpt3-{name}{suffix}", family, partial(gpt2, dim, layers, heads, 2048, band), published, _TABLE, misprint=_MISPRINTS.get(name)
        )
        for name, (dim, layers, heads, published) in _GPT3.items()
    )


ENTRIES = (
    Entry("gpt", "gpt", gpt1, 117_000_000, "Radford et al. 2019, table 2, first row", "openai-community/openai-gpt"),
    Entry("gpt2", "gpt2", partial(gpt2, 768, 12, 12), 124_000_000, _README, "openai-community/gpt2"),
    Entry("gpt2-medium", "gpt2", partial(gpt2, 1024, 24, 16), 355_000_000, _README, "openai-community/gpt2-medium"),
    Entry("gpt2-large", "gpt2", partial(gpt2, 1280, 36, 20), 774_000_000, _README, "openai-community/gpt2-large"),
    Entry("gpt2-xl", "gpt2", partial(gpt2, 1600, 48, 25), 1_558_000_000, _README, "openai-community/gpt2-xl"),
    *_gpt3(None),
    *_gpt3(BAND),
)
