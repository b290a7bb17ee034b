"""Mixtral (Jiang et al. 2024): Mistral with eight experts in every layer, of which a token is sent to two."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import Attention, Block, Experts, ModelSpec, RMSNorm, Rope
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import LLAMA_NORMS, decoder_rules, read_heads, read_layers, read_sizes, write_body
from weft.zoo.experts import MIXTRAL as NAMES
from weft.zoo.family import Entry, Family, Inexpressible, first_parts
from weft.zoo.rope import read_rope

ARCHITECTURES = ("MixtralForCausalLM", "MixtralModel")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ARCHITECTURES)
    sizes = read_sizes(reader, context_default=131072, tied_default=False)
    mixer = Attention(
        **read_heads(reader, kv_default=8), rope=read_rope(reader, sizes["context"]), window=reader.given("sliding_window", None)
    )
    channel = Experts(
        experts=reader.integer("num_local_experts", 8),
        top_k=reader.integer("num_experts_per_tok", 2),
        hidden=reader.integer("intermediate_size"),
        activation=reader.activation("hidden_act", "silu"),
    )
    reader.get("router_aux_loss_coef")  # of a loss that transformers adds on request only: how to train is the recipe's affair
    reader.only("router_jitter_noise", 0, 0.0)
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-5))
    layers = (Block(repeat=read_layers(reader), mixer=mixer, channel=channel),)
    reader.finish()
    return ModelSpec(**sizes, norm=norm, layers=layers)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = first_parts(spec, "pre", Attention, Experts)
    if channel.shared or channel.choice_bias:
        raise Inexpressible
    return {
        **write_body(spec, mixer, channel.hidden),
        "hidden_act": activation_name(channel.activation, ACTIVATIONS),
        "sliding_window": mixer.window,
        "num_local_experts": channel.experts,
        "num_experts_per_tok": channel.top_k,
    }


MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    classifier="MixtralForSequenceClassification",
    prefix="model.",
    from_config=from_config,
    to_config=to_config,
    rules=partial(decoder_rules, norms=LLAMA_NORMS, experts=NAMES),
)


def mixtral(size: tuple[int, int, int, int], vocab: int, context: int) -> ModelSpec:
    """Mixtral of size (dim, layers, heads, hidden of an expert)."""
    dim, layers, heads, hidden = size
    mixer = Attention(heads=heads, kv_heads=8, rope=Rope(base=1000000.0))
    block = Block(repeat=layers, mixer=mixer, channel=Experts(experts=8, top_k=2, hidden=hidden))
    return ModelSpec(vocab=vocab, dim=dim, context=context, norm=RMSNorm(eps=1e-5), tie_embeddings=False, layers=(block,))


_INDEX = "tensor index of the Hugging Face repo"
_SMALL, _LARGE = (4096, 32, 32, 14336), (6144, 56, 48, 16384)

ENTRIES = (
    Entry("mixtral-8x7b", "mixtral", partial(mixtral, _SMALL, 32000, 32768), 46_702_792_704, _INDEX, "mistralai/Mixtral-8x7B-v0.1"),
    Entry("mixtral-8x22b", "mixtral", partial(mixtral, _LARGE, 32000, 65536), 140_620_634_112, _INDEX, "mistralai/Mixtral-8x22B-v0.1"),
)
