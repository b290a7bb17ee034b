"""Qwen 2.5 (Qwen Team 2024) and Qwen 3 dense (Qwen Team 2025): biased queries, keys and values in the first, normed heads in the second."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import Attention, Block, Gated, ModelSpec, RMSNorm, Rope
from weft.zoo.config import ACTIVATIONS, ConfigReader, activation_name
from weft.zoo.decoder import LLAMA_NORMS, decoder_rules, layer_types, layer_windows, read_heads, read_layers, read_sizes, write_body
from weft.zoo.family import Entry, Family, first_parts, fold, windows
from weft.zoo.rope import read_rope


def from_qwen2(config: Mapping[str, Any]) -> ModelSpec:
    return _from_config(ConfigReader(config, ("Qwen2ForCausalLM", "Qwen2Model")), normed=False)


def from_qwen3(config: Mapping[str, Any]) -> ModelSpec:
    return _from_config(ConfigReader(config, ("Qwen3ForCausalLM", "Qwen3Model")), normed=True)


def _from_config(reader: ConfigReader, normed: bool) -> ModelSpec:
    """Qwen 3 (`normed`) norms each head; its biases are an option where Qwen 2 always has them on q, k and v."""
    sizes = read_sizes(reader, context_default=32768, tied_default=False)
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6))
    bias = reader.flag("attention_bias", False) if normed else False
    heads = read_heads(reader, kv_default=32, width_default=128 if normed else None)
    rope = read_rope(reader, sizes["context"])
    channel = Gated(hidden=reader.integer("intermediate_size"), activation=reader.activation("hidden_act", "silu"))
    reader.only("use_mrope", False)
    blocks = [
        Block(
            mixer=Attention(
                **heads, rope=rope, window=window, qkv_bias=bias or not normed, out_bias=bias, qk_norm=norm if normed else None
            ),
            channel=channel,
        )
        for window in _windows(reader)
    ]
    reader.finish()
    return ModelSpec(**sizes, norm=norm, layers=fold(blocks))


def _windows(reader: ConfigReader) -> list[int | None]:
    """Layers from `max_window_layers` on slide, where `use_sliding_window` says so and no `layer_types` says otherwise."""
    layers = read_layers(reader)
    first, given = reader.number("max_window_layers", 28), reader.given("sliding_window", 4096)
    window = given if reader.flag("use_sliding_window", False) else None
    return layer_windows(reader, layers, window, [window is not None and i >= first for i in range(layers)])


def _to_config(spec: ModelSpec, normed: bool) -> dict[str, Any]:
    mixer, channel = first_parts(spec, "pre", Attention, Gated)
    kinds, window = layer_types(windows(spec))
    config = {
        **write_body(spec, mixer, channel.hidden),
        "hidden_act": activation_name(channel.activation, ACTIVATIONS),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": len(kinds),
        "layer_types": kinds,
    }
    if normed:
        config |= {"head_dim": mixer.width(spec.dim), "attention_bias": mixer.out_bias}
    return config


QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    prefix="model.",
    from_config=from_qwen2,
    to_config=partial(_to_config, normed=False),
    rules=partial(decoder_rules, norms=LLAMA_NORMS),
)
QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    prefix="model.",
    from_config=from_qwen3,
    to_config=partial(_to_config, normed=True),
    rules=partial(decoder_rules, norms=LLAMA_NORMS),
)


def qwen25(
    size: tuple[int, int, int, int, int], vocab: int = 152064, context: int = 131072, eps: float = 1e-6, tied: bool = False
) -> ModelSpec:
    """Qwen 2.5 of size (dim, layers, heads, kv_heads, hidden)."""
    dim, layers, heads, kv_heads, hidden = size
    mixer = Attention(heads=heads, kv_heads=kv_heads, rope=Rope(base=1000000.0), qkv_bias=True)
    block = Block(repeat=layers, mixer=mixer, channel=Gated(hidden=hidden))
    return ModelSpec(vocab=vocab, dim=dim, context=context, norm=RMSNorm(eps=eps), tie_embeddings=tied, layers=(block,))


def qwen3(size: tuple[int, int, int, int, int], tied: bool = False) -> ModelSpec:
    """Qwen 3 of size (dim, layers, heads, kv_heads, hidden); heads are always 128 wide."""
    dim, layers, heads, kv_heads, hidden = size
    norm = RMSNorm(eps=1e-6)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=128, rope=Rope(base=1000000.0), qk_norm=norm)
    block = Block(repeat=layers, mixer=mixer, channel=Gated(hidden=hidden))
    return ModelSpec(vocab=151936, dim=dim, context=40960, norm=norm, tie_embeddings=tied, layers=(block,))


_SMALL = partial(qwen25, vocab=151936, tied=True)
_LARGE = partial(qwen25, eps=1e-5)


def _rows(series: str, family: str, sizes: dict[str, tuple[partial[ModelSpec], int]]) -> tuple[Entry, ...]:
    source = "tensor index of the Hugging Face repo"
    prefix = "Qwen/Qwen" + series.removeprefix("qwen")
    return tuple(
        Entry(f"{series}-{size.lower()}", family, spec, published, source, f"{prefix}-{size}") for size, (spec, published) in sizes.items()
    )


ENTRIES = _rows(
    "qwen2.5",
    "qwen2",
    {
        "0.5B": (partial(_SMALL, (896, 24, 14, 2, 4864), context=32768), 494_032_768),
        "1.5B": (partial(_SMALL, (1536, 28, 12, 2, 8960)), 1_543_714_304),
        "3B": (partial(_SMALL, (2048, 36, 16, 2, 11008), context=32768), 3_085_938_688),
        "7B": (partial(qwen25, (3584, 28, 28, 4, 18944)), 7_615_616_512),
        "14B": (partial(_LARGE, (5120, 48, 40, 8, 13824)), 14_770_033_664),
        "32B": (partial(_LARGE, (5120, 64, 40, 8, 27648)), 32_763_876_352),
        "72B": (partial(_LARGE, (8192, 80, 64, 8, 29568)), 72_706_203_648),
    },
) + _rows(
    "qwen3",
    "qwen3",
    {
        "0.6B": (partial(qwen3, (1024, 28, 16, 8, 3072), tied=True), 596_049_920),
        "1.7B": (partial(qwen3, (2048, 28, 16, 8, 6144), tied=True), 1_720_574_976),
        "4B": (partial(qwen3, (2560, 36, 32, 8, 9728), tied=True), 4_022_468_096),
        "8B": (partial(qwen3, (4096, 36, 32, 8, 12288)), 8_190_735_360),
        "14B": (partial(qwen3, (5120, 40, 40, 8, 17408)), 14_768_307_200),
        "32B": (partial(qwen3, (5120, 64, 64, 8, 25600)), 32_762_123_264),
    },
)
