"""Llama 1 to 3.3 (Touvron et al. 2023a, 2023b; Grattafiori et al. 2024) and models of the same shape."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import Attention, Block, Gated, Llama3Scaling, ModelSpec, RMSNorm, Rope
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import LLAMA_NORMS, decoder_rules, read_heads, read_layers, read_sizes, write_body
from weft.zoo.family import Entry, Family, Inexpressible, first_parts
from weft.zoo.rope import read_rope

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ARCHITECTURES)
    sizes = read_sizes(reader, context_default=2048, tied_default=False)
    bias = reader.flag("attention_bias", False)
    mixer = Attention(**read_heads(reader, kv_default=None), rope=read_rope(reader, sizes["context"]), qkv_bias=bias, out_bias=bias)
    channel = Gated(
        hidden=reader.integer("intermediate_size"),
        activation=reader.activation("hidden_act", "silu"),
        bias=reader.flag("mlp_bias", False),
    )
    reader.only("pretraining_tp", 1, remedy="other values split the same products: set it to 1")
    reader.only("rope_interleaved", False)
    reader.only("max_sequence_length", sizes["context"])
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6))
    layers = (Block(repeat=read_layers(reader), mixer=mixer, channel=channel),)
    reader.finish()
    return ModelSpec(**sizes, norm=norm, layers=layers)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = first_parts(spec, "pre", Attention, Gated)
    if spec.dim % mixer.heads:  # LlamaConfig refuses it, with or without head_dim
        raise Inexpressible
    return {
        **write_body(spec, mixer, channel.hidden),
        "hidden_act": activation_name(channel.activation, ACTIVATIONS),
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": channel.bias,
    }


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    prefix="model.",
    from_config=from_config,
    to_config=to_config,
    rules=partial(decoder_rules, norms=LLAMA_NORMS),
)


def build(
    size: tuple[int, int, int, int, int],
    vocab: int = 32000,
    context: int = 2048,
    base: float = 10000.0,
    eps: float = 1e-5,
    tied: bool = False,
    stretch: float | None = None,
) -> ModelSpec:
    """A Llama of size (dim, layers, heads, kv_heads, hidden); `stretch` is the factor of Llama 3.1's rotary scaling."""
    dim, layers, heads, kv_heads, hidden = size
    rope = Rope(base=base, scaling=None if stretch is None else Llama3Scaling(factor=stretch))
    block = Block(repeat=layers, mixer=Attention(heads=heads, kv_heads=kv_heads, rope=rope), channel=Gated(hidden=hidden))
    return ModelSpec(vocab=vocab, dim=dim, context=context, norm=RMSNorm(eps=eps), tie_embeddings=tied, layers=(block,))


_SIZE_7B, _SIZE_13B = (4096, 32, 32, 32, 11008), (5120, 40, 40, 40, 13824)
_SIZE_8B, _SIZE_70B, _SIZE_405B = (4096, 32, 32, 8, 14336), (8192, 80, 64, 8, 28672), (16384, 126, 128, 8, 53248)

llama1 = partial(build, eps=1e-6)
llama2 = partial(build, context=4096)
llama3 = partial(build, vocab=128256, context=8192, base=500000.0)
llama31 = partial(build, vocab=128256, context=131072, base=500000.0, stretch=8.0)
llama32 = partial(build, vocab=128256, context=131072, base=500000.0, stretch=32.0, tied=True)
smollm2 = partial(build, vocab=49152, context=8192, tied=True)

_PAPER = "Touvron et al. 2023a, table 2"
_CARD = "tensor index of the Hugging Face repo"


def _row(name: str, spec: partial[ModelSpec], published: int, repo: str | None, source: str = _CARD) -> Entry:
    return Entry(name, "llama", spec, published, source, repo)


ENTRIES = (
    _row("llama-7b", partial(llama1, _SIZE_7B), 6_700_000_000, None, _PAPER),
    _row("llama-13b", partial(llama1, _SIZE_13B), 13_000_000_000, None, _PAPER),
    _row("llama-33b", partial(llama1, (6656, 60, 52, 52, 17920)), 32_500_000_000, None, _PAPER),
    _row("llama-65b", partial(build, (8192, 80, 64, 64, 22016)), 65_200_000_000, None, _PAPER),
    _row("llama2-7b", partial(llama2, _SIZE_7B), 6_738_415_616, "meta-llama/Llama-2-7b-hf"),
    _row("llama2-13b", partial(llama2, _SIZE_13B), 13_015_864_320, "meta-llama/Llama-2-13b-hf"),
    _row("llama2-70b", partial(llama2, _SIZE_70B), 68_976_648_192, "meta-llama/Llama-2-70b-hf"),
    _row("llama3-8b", partial(llama3, _SIZE_8B), 8_030_261_248, "meta-llama/Meta-Llama-3-8B"),
    _row("llama3-70b", partial(llama3, _SIZE_70B), 70_553_706_496, "meta-llama/Meta-Llama-3-70B"),
    _row("llama3.1-8b", partial(llama31, _SIZE_8B), 8_030_261_248, "meta-llama/Llama-3.1-8B"),
    _row("llama3.1-70b", partial(llama31, _SIZE_70B), 70_553_706_496, "meta-llama/Llama-3.1-70B"),
    _row("llama3.1-405b", partial(llama31, _SIZE_405B), 405_853_388_800, "meta-llama/Llama-3.1-405B"),
    _row("llama3.2-1b", partial(llama32, (2048, 16, 32, 8, 8192)), 1_235_814_400, "meta-llama/Llama-3.2-1B"),
    _row("llama3.2-3b", partial(llama32, (3072, 28, 24, 8, 8192)), 3_212_749_824, "meta-llama/Llama-3.2-3B"),
    _row("llama3.3-70b", partial(llama31, _SIZE_70B), 70_553_706_496, "meta-llama/Llama-3.3-70B-Instruct"),
    _row("smollm2-135m", partial(smollm2, (576, 30, 9, 3, 1536), base=100000.0), 134_515_008, "HuggingFaceTB/SmolLM2-135M"),
    _row("smollm2-360m", partial(smollm2, (960, 32, 15, 5, 2560), base=100000.0), 361_821_120, "HuggingFaceTB/SmolLM2-360M"),
    _row("smollm2-1.7b", partial(smollm2, (2048, 24, 32, 32, 8192), base=130000.0), 1_711_376_384, "HuggingFaceTB/SmolLM2-1.7B"),
    _row(
        "tinyllama-1.1b", partial(build, (2048, 22, 32, 4, 5632)), 1_100_048_384, "TinyLlama/TinyLlama_v1.1"
    ),
)  # fmt: skip
