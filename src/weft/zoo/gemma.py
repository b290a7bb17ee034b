"""Gemma 2 (Gemma Team 2024): norms around every part, soft-capped scores and logits, every other layer sliding."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import Attention, Block, Gated, ModelSpec, RMSNorm, Rope
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import decoder_rules, layer_types, layer_windows, read_heads, read_layers, read_sizes, write_body
from weft.zoo.family import Entry, Family, Inexpressible, first_parts, fold, windows
from weft.zoo.rope import read_rope

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma2Model")
NORMS = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mixer_post_norm",
    "pre_feedforward_layernorm": "channel_norm",
    "post_feedforward_layernorm": "channel_post_norm",
}


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ARCHITECTURES)
    sizes = read_sizes(reader, context_default=8192, tied_default=True)
    heads = read_heads(reader, kv_default=4, width_default=256)
    rope = read_rope(reader, sizes["context"])
    bias = reader.flag("attention_bias", False)
    softcap = reader.given("attn_logit_softcapping", 50.0)
    scale = reader.integer("query_pre_attn_scalar", 256) ** -0.5
    window = reader.given("sliding_window", 4096)
    reader.only("sliding_window_size", window)
    reader.only("use_bidirectional_attention", False)
    reader.only("hidden_act", reader.get("hidden_activation", "gelu_pytorch_tanh"))
    activation = reader.activation("hidden_activation", "gelu_pytorch_tanh")
    channel = Gated(hidden=reader.integer("intermediate_size"), activation=activation)
    layers = read_layers(reader)
    each_window = layer_windows(reader, layers, window, [i % 2 == 0 for i in range(layers)])
    blocks = [
        Block(
            topology="sandwich",
            mixer=Attention(**heads, rope=rope, window=size, softcap=softcap, scale=scale, qkv_bias=bias, out_bias=bias),
            channel=channel,
        )
        for size in each_window
    ]
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6), unit_offset=True)
    logit_softcap = reader.given("final_logit_softcapping", 30.0)
    reader.finish()
    return ModelSpec(**sizes, norm=norm, layers=fold(blocks), scale_embeddings=True, logit_softcap=logit_softcap)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = first_parts(spec, "sandwich", Attention, Gated)
    if spec.dim % mixer.heads:  # Gemma2Config refuses it, with or without head_dim
        raise Inexpressible
    return write_gemma(spec, mixer, channel)


def write_gemma(spec: ModelSpec, mixer: Attention, channel: Gated) -> dict[str, Any]:
    """The keys that Gemma 2 and 3 share."""
    kinds, window = layer_types(windows(spec))
    scale = mixer.scale or mixer.width(spec.dim) ** -0.5
    return {
        **write_body(spec, mixer, channel.hidden),
        "head_dim": mixer.width(spec.dim),
        "hidden_activation": activation_name(channel.activation, {"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATIONS}),
        "attention_bias": mixer.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": mixer.softcap,
        "final_logit_softcapping": spec.logit_softcap,
        "sliding_window": window or 4096,  # transformers builds its mask even where no layer slides
        "layer_types": kinds,
    }


GEMMA2 = Family(
    name="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    prefix="model.",
    from_config=from_config,
    to_config=to_config,
    rules=partial(decoder_rules, norms=NORMS),
)


def gemma2(size: tuple[int, int, int, int, int, int], query_scalar: int = 256) -> ModelSpec:
    """Gemma 2 of size (dim, layers, heads, kv_heads, head_dim, hidden); scores are divided by sqrt(query_scalar)."""
    dim, layers, heads, kv_heads, head_dim, hidden = size

    def block(window: int | None) -> Block:
        mixer = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=Rope(),
            window=window,
            softcap=50.0,
            scale=float(query_scalar) ** -0.5,
        )
        return Block(topology="sandwich", mixer=mixer, channel=Gated(hidden=hidden, activation="gelu_tanh"))

    return ModelSpec(
        vocab=256000,
        dim=dim,
        context=8192,
        norm=RMSNorm(eps=1e-6, unit_offset=True),
        layers=fold([block(4096 if i % 2 == 0 else None) for i in range(layers)]),
        scale_embeddings=True,
        logit_softcap=30.0,
    )


_CARD = "tensor index of the Hugging Face repo"

ENTRIES = (
    Entry("gemma2-2b", "gemma2", partial(gemma2, (2304, 26, 8, 4, 256, 9216)), 2_614_341_888, _CARD, "google/gemma-2-2b"),
    Entry("gemma2-9b", "gemma2", partial(gemma2, (3584, 42, 16, 8, 256, 14336)), 9_241_705_984, _CARD, "google/gemma-2-9b"),
    Entry("gemma2-27b", "gemma2", partial(gemma2, (4608, 46, 32, 16, 128, 36864), 144), 27_227_128_320, _CARD, "google/gemma-2-27b"),
)
