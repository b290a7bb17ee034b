"""Mistral 7B (Jiang et al. 2023): Llama with a sliding window in every layer, until v0.2 dropped the window."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import Attention, Block, Gated, ModelSpec, RMSNorm, Rope
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import LLAMA_NORMS, decoder_rules, read_heads, read_layers, read_sizes, write_body
from weft.zoo.family import Entry, Family, first_parts
from weft.zoo.rope import read_rope

ARCHITECTURES = ("MistralForCausalLM", "MistralModel")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ARCHITECTURES)
    sizes = read_sizes(reader, context_default=131072, tied_default=False)
    mixer = Attention(
        **read_heads(reader, kv_default=8), rope=read_rope(reader, sizes["context"]), window=reader.given("sliding_window", 4096)
    )
    channel = Gated(hidden=reader.integer("intermediate_size"), activation=reader.activation("hidden_act", "silu"))
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6))
    layers = (Block(repeat=read_layers(reader), mixer=mixer, channel=channel),)
    reader.finish()
    return ModelSpec(**sizes, norm=norm, layers=layers)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = first_parts(spec, "pre", Attention, Gated)
    return {
        **write_body(spec, mixer, channel.hidden),
        "hidden_act": activation_name(channel.activation, ACTIVATIONS),
        "sliding_window": mixer.window,
    }


MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    prefix="model.",
    from_config=from_config,
    to_config=to_config,
    rules=partial(decoder_rules, norms=LLAMA_NORMS),
)


def mistral_7b(vocab: int = 32000, window: int | None = None, base: float = 1000000.0) -> ModelSpec:
    mixer = Attention(heads=32, kv_heads=8, rope=Rope(base=base), window=window)
    block = Block(repeat=32, mixer=mixer, channel=Gated(hidden=14336))
    return ModelSpec(vocab=vocab, dim=4096, context=32768, norm=RMSNorm(eps=1e-5), tie_embeddings=False, layers=(block,))


_CARD = "tensor index of the Hugging Face repo"

ENTRIES = (
    Entry("mistral-7b", "mistral", partial(mistral_7b, window=4096, base=10000.0), 7_241_732_096, _CARD, "mistralai/Mistral-7B-v0.1"),
    Entry("mistral-7b-v0.2", "mistral", mistral_7b, 7_241_732_096, _CARD, "mistralai/Mistral-7B-Instruct-v0.2"),
    Entry("mistral-7b-v0.3", "mistral", partial(mistral_7b, vocab=32768), 7_248_023_552, _CARD, "mistralai/Mistral-7B-v0.3"),
)
