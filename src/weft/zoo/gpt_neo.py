"""GPT-Neo (Black et al. 2021): GPT-2 with every other layer local, and scores that are not scaled."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import MLP, Attention, Block, Dropout, LayerNorm, Learned, ModelSpec
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import read_layers
from weft.zoo.family import Entry, Family, Inexpressible, first_parts, fold, windows
from weft.zoo.rules import Cat, Copy, Drop, Rule, copy, head

ARCHITECTURES = ("GPTNeoForCausalLM", "GPTNeoModel")
KINDS = ("global", "local")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ARCHITECTURES)
    dim, heads, layers = reader.integer("hidden_size"), reader.integer("num_heads"), read_layers(reader, "num_layers")
    reader.only("num_attention_heads", heads)
    reader.only("num_hidden_layers", layers)
    activation = reader.activation("activation_function", "gelu_new")
    channel = MLP(hidden=reader.integer("intermediate_size", 4 * dim), activation=activation)
    window = reader.integer("window_size", 256)

    def block(kind: str) -> Block:
        mixer = Attention(heads=heads, scale=1.0, out_bias=True, window=window if kind == "local" else None)
        return Block(mixer=mixer, channel=channel)

    blocks = [block(kind) for kind in _kinds(reader, layers)]
    length = reader.integer("max_position_embeddings", 2048)
    dropout = Dropout(
        embed=reader.number("embed_dropout", 0.0),
        attention=reader.number("attention_dropout", 0.0),
        residual=reader.number("resid_dropout", 0.0),
    )
    norm, vocab = LayerNorm(eps=reader.number("layer_norm_epsilon", 1e-5)), reader.integer("vocab_size", 50257)
    tied = reader.flag("tie_word_embeddings", True)
    reader.get("classifier_dropout")  # of a head for classes, which no language model has
    reader.finish()
    return ModelSpec(
        vocab=vocab,
        dim=dim,
        context=length,
        norm=norm,
        position=Learned(length=length),
        tie_embeddings=tied,
        dropout=dropout,
        layers=fold(blocks),
    )


def _kinds(reader: ConfigReader, layers: int) -> list[str]:
    """global or local for every layer: `attention_types` is a list of (pattern, times), `attention_layers` the same written out."""
    given = reader.get("attention_types", [[["global", "local"], 12]])
    kinds: list[Any] = []
    for item in given if isinstance(given, list) else []:
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and item[1] in range(1, layers + 1):
            kinds += item[0] * item[1]
    if len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        raise reader.refuse(
            "attention_types", f"it must list patterns of global and local, with their repeats, for {layers} layers in all."
        )
    if reader.get("attention_layers", kinds) != kinds:
        raise reader.refuse("attention_layers", "attention_types says otherwise; keep one of them.")
    return kinds


def to_config(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = first_parts(spec, "pre", Attention, MLP)
    if not isinstance(spec.norm, LayerNorm) or not isinstance(spec.position, Learned):
        raise Inexpressible
    found = windows(spec)
    local = {window for window in found if window is not None}
    if len(local) > 1:
        raise Inexpressible
    kinds = ["global" if window is None else "local" for window in found]
    return {
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.position.length,
        "hidden_size": spec.dim,
        "num_layers": len(kinds),
        "num_heads": mixer.heads,
        "intermediate_size": channel.hidden,
        "attention_types": _patterns(kinds),
        "attention_layers": kinds,
        "window_size": next(iter(local), 256),
        "activation_function": activation_name(channel.activation, {"gelu_new": "gelu_tanh", **ACTIVATIONS}),
        "layer_norm_epsilon": spec.norm.eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "embed_dropout": spec.dropout.embed,
        "attention_dropout": spec.dropout.attention,
        "resid_dropout": spec.dropout.residual,
    }


def _patterns(kinds: list[str]) -> list[Any]:
    """Kinds as one pattern and its repeats: the shortest there is."""
    period = next(p for p in range(1, len(kinds) + 1) if len(kinds) % p == 0 and kinds == kinds[:p] * (len(kinds) // p))
    return [[kinds[:period], len(kinds) // period]]


def rules(spec: ModelSpec) -> list[Rule]:
    embedding = "transformer.wte.weight"
    rows: list[Rule] = [copy(embedding, "embed.weight"), copy("transformer.wpe.weight", "position.weight")]
    rows += [copy(f"transformer.ln_f.{kind}", f"norm.{kind}") for kind in ("weight", "bias")]
    rows.append(head(spec.tie_embeddings, "lm_head.weight", embedding))
    copies = {"attn.attention.out_proj": "mixer.out", "mlp.c_fc": "channel.up", "mlp.c_proj": "channel.down"}
    copies |= {"ln_1": "mixer_norm", "ln_2": "channel_norm"}
    for i in range(len(spec.blocks())):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        sources = tuple(Copy(f"{theirs}.attn.attention.{part}_proj.weight") for part in "qkv")
        rows.append(Cat(f"{ours}.mixer.qkv.weight", sources, (spec.dim,) * 3))
        rows += [copy(f"{theirs}.{name}.{kind}", f"{ours}.{part}.{kind}") for name, part in copies.items() for kind in ("weight", "bias")]
        rows += [Drop(f"{theirs}.attn.attention.bias"), Drop(f"{theirs}.attn.attention.masked_bias")]
    return rows


GPT_NEO = Family(
    name="gpt-neo",
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    classifier="GPTNeoForSequenceClassification",
    prefix="transformer.",
    from_config=from_config,
    to_config=to_config,
    rules=rules,
)


def gpt_neo(dim: int, layers: int, heads: int) -> ModelSpec:
    """GPT-Neo of this size: layers alternate between dense and a window of 256 tokens."""

    def block(window: int | None) -> Block:
        return Block(mixer=Attention(heads=heads, scale=1.0, out_bias=True, window=window), channel=MLP(hidden=4 * dim))

    blocks = fold([block(256 if i % 2 else None) for i in range(layers)])
    return ModelSpec(vocab=50257, dim=dim, context=2048, position=Learned(length=2048), layers=blocks)


_NAMES = "the name of the model, in the README of EleutherAI's gpt-neo repository"

ENTRIES = (
    Entry("gptneo-125m", "gpt-neo", partial(gpt_neo, 768, 12, 12), 125_000_000, _NAMES, "EleutherAI/gpt-neo-125m"),
    Entry("gptneo-1.3b", "gpt-neo", partial(gpt_neo, 2048, 24, 16), 1_300_000_000, _NAMES, "EleutherAI/gpt-neo-1.3B"),
    Entry("gptneo-2.7b", "gpt-neo", partial(gpt_neo, 2560, 32, 20), 2_700_000_000, _NAMES, "EleutherAI/gpt-neo-2.7B"),
)
