"""Gemma 3 (Gemma Team 2025), the text model: five sliding layers to one that sees everything, each kind with a rotation of its own."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import Attention, Block, Gated, LinearScaling, ModelSpec, RMSNorm, Rope
from weft.zoo.config import ConfigReader
from weft.zoo.decoder import decoder_rules, layer_types, layer_windows, read_heads, read_layers, read_sizes
from weft.zoo.family import Entry, Family, Inexpressible, first_parts, fold, windows
from weft.zoo.gemma import NORMS, write_gemma
from weft.zoo.rope import read_rope, write_rope

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3TextModel")
GLOBAL_BASE, LOCAL_BASE = 1_000_000.0, 10_000.0


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ARCHITECTURES)
    sizes = read_sizes(reader, context_default=131072, tied_default=True)
    heads = read_heads(reader, kv_default=4, width_default=256)
    ropes = _read_ropes(reader, sizes["context"])
    bias = reader.flag("attention_bias", False)
    scale = reader.integer("query_pre_attn_scalar", 256) ** -0.5
    window = reader.given("sliding_window", 4096)
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6), unit_offset=True)
    for key in ("use_bidirectional_attention", "attn_logit_softcapping"):
        if reader.get(key):
            raise reader.refuse(key, "a Gemma 3 that writes text has neither; make it null.")
    activation = reader.activation("hidden_activation", "gelu_pytorch_tanh")
    channel = Gated(hidden=reader.integer("intermediate_size"), activation=activation)
    layers = read_layers(reader)
    period = reader.integer("sliding_window_pattern", reader.integer("_sliding_window_pattern", 6))
    each_window = layer_windows(reader, layers, window, [bool((i + 1) % period) for i in range(layers)])
    blocks = [
        Block(
            topology="sandwich",
            mixer=Attention(**heads, rope=ropes[size is not None], window=size, scale=scale, qk_norm=norm, qkv_bias=bias, out_bias=bias),
            channel=channel,
        )
        for size in each_window
    ]
    logit_softcap = reader.get("final_logit_softcapping")
    reader.finish()
    return ModelSpec(**sizes, norm=norm, layers=fold(blocks), scale_embeddings=True, logit_softcap=logit_softcap)


def _read_ropes(reader: ConfigReader, context: int) -> tuple[Rope, Rope]:
    """The rotations of full and of sliding layers: two mappings in one (transformers 5), or two bases, and a scaling of the full ones'."""
    nested = reader.get("rope_parameters")
    base, local = reader.number("rope_theta", GLOBAL_BASE), reader.number("rope_local_base_freq", LOCAL_BASE)
    full: dict[str, Any] = {"rope_theta": base, "rope_scaling": reader.get("rope_scaling")}
    sliding: dict[str, Any] = {"rope_theta": local}
    if nested is not None:
        kinds = {"full_attention", "sliding_attention"}
        if not isinstance(nested, dict) or set(nested) - kinds or any(not isinstance(each, dict | None) for each in nested.values()):
            raise reader.refuse("rope_parameters", "it must map full_attention and sliding_attention to a rotation each.")
        if full["rope_scaling"] is not None:
            raise reader.refuse("rope_scaling", f"rope_parameters says {nested!r}; keep one of them.")
        full["rope_parameters"], sliding["rope_parameters"] = nested.get("full_attention") or {}, nested.get("sliding_attention") or {}
    readers = [ConfigReader({"model_type": reader.model_type, **values}) for values in (full, sliding)]
    return read_rope(readers[0], context), read_rope(readers[1], context)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel = first_parts(spec, "sandwich", Attention, Gated)
    if spec.dim % mixer.heads:  # Gemma3TextConfig refuses it, with or without head_dim
        raise Inexpressible
    kinds, _ = layer_types(windows(spec))
    ropes = dict(zip(kinds, (block.mixer.rope for block in spec.blocks() if isinstance(block.mixer, Attention)), strict=True))
    full = ropes.get("full_attention") or Rope(base=GLOBAL_BASE)
    sliding = ropes.get("sliding_attention") or Rope(base=LOCAL_BASE)
    if sliding.scaling is not None:
        raise Inexpressible
    return {**write_gemma(spec, mixer, channel), **write_rope(full), "rope_local_base_freq": sliding.base}


GEMMA3 = Family(
    name="gemma3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    prefix="model.",
    from_config=from_config,
    to_config=to_config,
    rules=partial(decoder_rules, norms=NORMS),
)


IMAGES = (
    "config.json (gemma3): this checkpoint holds an image encoder and, under language_model, a text model; Weft reads text models: "
    "save that part with its text_config as a checkpoint of its own (gemma3_text)."
)


def gemma3(size: tuple[int, int, int, int, int, int], window: int, context: int, vocab: int = 262208, scalar: int = 256) -> ModelSpec:
    """Gemma 3 of size (dim, layers, heads, kv_heads, head_dim, hidden); scores are divided by sqrt(scalar).

    Models of 128k tokens were stretched from 32k: the rotations of their full layers are eight times slower (section 2 of the report).
    """
    dim, layers, heads, kv_heads, head_dim, hidden = size
    norm = RMSNorm(eps=1e-6, unit_offset=True)
    full = Rope(base=GLOBAL_BASE, scaling=LinearScaling(factor=8.0) if context > 32768 else None)

    def block(width: int | None) -> Block:
        mixer = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=full if width is None else Rope(base=LOCAL_BASE),
            window=width,
            qk_norm=norm,
            scale=float(scalar) ** -0.5,
        )
        return Block(topology="sandwich", mixer=mixer, channel=Gated(hidden=hidden, activation="gelu_tanh"))

    blocks = fold([block(window if (i + 1) % 6 else None) for i in range(layers)])
    return ModelSpec(vocab=vocab, dim=dim, context=context, norm=norm, layers=blocks, scale_embeddings=True)


_TABLE = "Gemma Team 2025, table 1, without the image encoder"
_SMALL, _LARGE = {"window": 512, "context": 32768, "vocab": 262144}, {"window": 1024, "context": 131072}

ENTRIES = (
    Entry(
        "gemma3-270m",
        "gemma3",
        partial(gemma3, (640, 18, 4, 1, 256, 2048), **_SMALL),
        270_000_000,
        "model card: 170 million in embeddings and 100 million in blocks",
        "google/gemma-3-270m",
    ),
    Entry("gemma3-1b", "gemma3", partial(gemma3, (1152, 26, 4, 1, 256, 6912), **_SMALL), 1_000_000_000, _TABLE, "google/gemma-3-1b-pt"),
    Entry("gemma3-4b", "gemma3", partial(gemma3, (2560, 34, 8, 4, 256, 10240), **_LARGE), 3_884_000_000, _TABLE),
    Entry("gemma3-12b", "gemma3", partial(gemma3, (3840, 48, 16, 8, 256, 15360), **_LARGE), 11_771_000_000, _TABLE),
    Entry("gemma3-27b", "gemma3", partial(gemma3, (5376, 62, 32, 16, 128, 21504), scalar=168, **_LARGE), 27_016_000_000, _TABLE),
)
