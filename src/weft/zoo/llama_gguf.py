"""Llama in GGUF: its metadata as a spec and back, and its weight map. Everything under `llama.` is used or refused by name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from weft.errors import UserError, nearest
from weft.spec import Attention, Block, Gated, LinearScaling, Llama3Scaling, ModelSpec, RMSNorm, Rope, YarnScaling
from weft.zoo.family import Inexpressible, canonical, first_parts
from weft.zoo.rope import yarn_attention
from weft.zoo.rules import Cat, Copy, Drop, Interleave, One, Rule, Source, copy, head

ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp stores the factors that Llama 3's scaling gives, not the numbers they come from; these are the numbers of every release.
_RELEASED = Llama3Scaling(low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
_OURS = "weft.rope.scaling."
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "use_parallel_residual": (False,),
}


class _Reader:
    """The keys of one architecture, each read once; `finish` refuses the rest."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.values = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}

    def need(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(f"the GGUF file has no llama.{key}{nearest(key, self.values)}; convert the model again.")
        return self.values.pop(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.pop(key, default)

    def finish(self) -> None:
        for key, value in self.values.items():
            if not any(value == neutral for neutral in _NEUTRAL.get(key, ())):
                raise UserError(f"the GGUF file has llama.{key} = {value!r}, which Weft does not compute; give a plain Llama.")


def from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: Sequence[float] | None = None) -> ModelSpec:
    """The spec of a GGUF file of architecture llama.

    shapes   every tensor's shape by name: they say whether there are biases and a head of its own.
    factors  the entries of `rope_freqs.weight`, where the file has it.

    Raises UserError for another architecture and for anything that Weft would compute differently.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"the GGUF file holds a model of architecture '{architecture}'; Weft reads 'llama' from GGUF.")
    reader = _Reader(metadata)
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight"):
        if name not in shapes:
            raise UserError(f"the GGUF file has no tensor {name}; give a whole model, not a vocabulary or an adapter.")
    dim, heads = _one(reader, "embedding_length"), _one(reader, "attention.head_count")
    width = _one(reader, "attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if reader.get(key, width) != width:
            raise UserError(f"the GGUF file's llama.{key} is not the head's width {width}; Weft needs them equal.")
    groups = _one(reader, "attention.head_count_kv", heads)
    context = _one(reader, "context_length")
    vocab = shapes["token_embd.weight"][0]
    if reader.get("vocab_size", vocab) != vocab:
        raise UserError(f"the GGUF file's llama.vocab_size is not the {vocab} rows of token_embd.weight; convert the model again.")
    mixer = Attention(
        heads=heads,
        kv_heads=groups,
        head_dim=width if dim != heads * width else None,
        rope=_read_rope(reader, metadata, context, width, factors),
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
    )
    channel = Gated(hidden=_one(reader, "feed_forward_length"), bias="blk.0.ffn_gate.bias" in shapes)
    norm = RMSNorm(eps=_number(reader, "attention.layer_norm_rms_epsilon"))
    layers = (Block(repeat=_one(reader, "block_count", most=10_000), mixer=mixer, channel=channel),)
    reader.finish()
    return ModelSpec(vocab=vocab, dim=dim, context=context, norm=norm, tie_embeddings="output.weight" not in shapes, layers=layers)


def _one(reader: _Reader, key: str, default: int | None = None, most: int = 10**9) -> int:
    """A positive integer, given once or alike for every layer."""
    value = reader.need(key) if default is None else reader.get(key, default)
    if isinstance(value, list):
        if len(set(map(str, value))) != 1:
            raise UserError(f"the GGUF file's llama.{key} differs from layer to layer; Weft reads Llamas whose layers are alike.")
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(f"the GGUF file's llama.{key} is {value!r}; it must be an integer from 1 to {most:,}. Convert the model again.")
    return value


def _number(reader: _Reader, key: str, default: float | None = None) -> float:
    """A positive number."""
    value = reader.need(key) if default is None else reader.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"the GGUF file's llama.{key} is {value!r}; it must be a positive number. Convert the model again.")
    return _decimal(value)


def _decimal(value: float) -> float:
    """The decimal number that a float32 was written for."""
    return float(f"{value:.7g}")


def _read_rope(reader: _Reader, metadata: Mapping[str, Any], context: int, width: int, factors: Sequence[float] | None) -> Rope:
    base = _number(reader, "rope.freq_base", 10000.0)
    kind = reader.get("rope.scaling.type", "linear")
    stretch = _number(reader, "rope.scale_linear", 1.0)  # how files before `rope.scaling` said it
    factor = _number(reader, "rope.scaling.factor", stretch)
    original = _one(reader, "rope.scaling.original_context_length", context)
    sharpen = _number(reader, "rope.scaling.attn_factor", 1.0)
    plain = kind == "none" or (kind == "linear" and factor == 1)
    if factors is not None and any(abs(entry - 1) > 1e-6 for entry in factors):
        if not plain:
            raise UserError(f"the GGUF file has both {ROPE_FACTORS} and {kind} scaling; Weft computes one scaling.")
        return Rope(base=base, scaling=_fit_llama3(metadata, base, width, factors))
    if plain:
        return Rope(base=base, scaling=_stored_llama3(metadata))
    if kind == "linear":
        return Rope(base=base, scaling=LinearScaling(factor=factor))
    if kind != "yarn":
        raise UserError(f"the GGUF file scales rotary positions by '{kind}'; Weft knows none, linear, yarn and Llama 3's factors.")
    yarn = YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=_number(reader, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(reader, "rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=None if sharpen == 1.0 else sharpen * yarn_attention(factor),
    )
    return Rope(base=base, scaling=yarn)


def _stored_llama3(metadata: Mapping[str, Any]) -> Llama3Scaling | None:
    """The scaling as Weft writes it beside the factors."""
    given = {key.removeprefix(_OURS): value for key, value in metadata.items() if key.startswith(_OURS)}
    if not given:
        return None
    if any(isinstance(value, float) and not math.isfinite(value) for value in given.values()):
        raise UserError(f"the GGUF file's {_OURS}* are not finite numbers; convert the model again.")
    return Llama3Scaling.model_validate({key: _decimal(value) if isinstance(value, float) else value for key, value in given.items()})


def _fit_llama3(metadata: Mapping[str, Any], base: float, width: int, factors: Sequence[float]) -> Llama3Scaling:
    """The scaling that gives these factors; raises UserError where none does."""
    scaling = _stored_llama3(metadata) or Llama3Scaling.model_validate({**_RELEASED.model_dump(), "factor": _decimal(max(factors))})
    expected = llama3_factors(scaling, base, width)
    if len(expected) != len(factors) or any(abs(a - b) > 1e-4 * b for a, b in zip(expected, factors, strict=True)):
        raise UserError(f"the GGUF file's {ROPE_FACTORS} are not those of Llama 3's scaling; Weft cannot tell how they were made.")
    return scaling


def llama3_factors(scaling: Llama3Scaling, base: float, width: int) -> list[float]:
    """What each rotary frequency of a head `width` wide is divided by: `width` / 2 numbers between 1 and the factor."""
    factors = []
    for channel in range(0, width, 2):
        rotations = scaling.original_context * base ** (-channel / width) / (2 * math.pi)
        kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        factors.append(1 / (kept + (1 - kept) / scaling.factor))
    return factors


def to_gguf(spec: ModelSpec) -> dict[str, Any]:
    """The architecture's metadata for a spec; raises UserError where GGUF's llama would compute something else."""
    if spec.score is not None:
        raise UserError("the model is a classifier or a reward model, and GGUF has no place for its score head; export it with --to hf.")
    try:
        mixer, channel = first_parts(spec, "pre", Attention, Gated)
        if mixer.rope is None or len(set(spec.blocks())) > 1:
            raise Inexpressible
        metadata = _metadata(spec, mixer, channel)
        shapes = _shapes(spec)
        back = from_gguf({"general.architecture": "llama", **metadata}, shapes, _factors(mixer.rope, mixer.width(spec.dim)))
    except (Inexpressible, UserError):
        back = None
    if back is None or canonical(back) != canonical(spec):
        raise UserError(
            "GGUF holds this model only in the Llama family (RMS norms, rotary positions, SiLU-gated channels, full attention, "
            "all layers alike), and it is not one; export it with --to hf."
        )
    return metadata


def _metadata(spec: ModelSpec, mixer: Attention, channel: Gated) -> dict[str, Any]:
    assert mixer.rope is not None
    width = mixer.width(spec.dim)
    plain: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "context_length": spec.context,
        "embedding_length": spec.dim,
        "block_count": len(spec.blocks()),
        "feed_forward_length": channel.hidden,
        "attention.head_count": mixer.heads,
        "attention.head_count_kv": mixer.num_kv_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": spec.norm.eps,
        "rope.dimension_count": width,
        "rope.freq_base": float(mixer.rope.base),
    }
    scaling = mixer.rope.scaling
    if isinstance(scaling, Llama3Scaling):
        ours = {key: value for key, value in scaling.model_dump().items() if key != "type"}
        return {**{f"llama.{key}": value for key, value in plain.items()}, **{f"{_OURS}{key}": value for key, value in ours.items()}}
    if isinstance(scaling, LinearScaling | YarnScaling):
        plain |= {"rope.scaling.type": scaling.type, "rope.scaling.factor": float(scaling.factor)}
    if isinstance(scaling, YarnScaling):
        plain["rope.scaling.original_context_length"] = scaling.original_context
        if scaling.attention_factor is not None:
            plain["rope.scaling.attn_factor"] = scaling.attention_factor / yarn_attention(scaling.factor)
    return {f"llama.{key}": value for key, value in plain.items()}


def rope_factors(spec: ModelSpec) -> list[float] | None:
    """The entries of `rope_freqs.weight` that a file of this spec needs, if any."""
    mixer = spec.blocks()[0].mixer
    if not isinstance(mixer, Attention) or mixer.rope is None:
        return None
    return _factors(mixer.rope, mixer.width(spec.dim))


def _factors(rope: Rope, width: int) -> list[float] | None:
    return llama3_factors(rope.scaling, rope.base, width) if isinstance(rope.scaling, Llama3Scaling) else None


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The names that `from_gguf` looks for, of a file that holds this spec."""
    named: dict[str, tuple[int, ...]] = {}
    for row in rules(spec):
        for source in row.sources if isinstance(row, Cat) else [row.source] if isinstance(row, One) else []:
            named[source.name] = (spec.vocab, spec.dim) if source.name == "token_embd.weight" else ()
    return named


def rules(spec: ModelSpec) -> list[Rule]:
    """The weight map: as in Hugging Face, but for the names, and for the rows of queries and keys, whose pairs are neighbours."""
    rows: list[Rule] = [
        copy("token_embd.weight", "embed.weight"),
        copy("output_norm.weight", "norm.weight"),
        head(spec.tie_embeddings, "output.weight", "token_embd.weight"),
        Drop(ROPE_FACTORS),
    ]
    for i, block in enumerate(spec.blocks()):
        assert isinstance(block.mixer, Attention)
        assert isinstance(block.channel, Gated)
        rows += _layer(f"blk.{i}", f"blocks.{i}", block.mixer, block.channel, spec.dim)
    return rows


def _layer(theirs: str, ours: str, mixer: Attention, channel: Gated, dim: int) -> list[Rule]:
    width, groups = mixer.width(dim), mixer.num_kv_heads

    def qkv(kind: str) -> Cat:
        sources: tuple[Source, ...] = (
            Interleave(f"{theirs}.attn_q.{kind}", mixer.heads),
            Interleave(f"{theirs}.attn_k.{kind}", groups),
            Copy(f"{theirs}.attn_v.{kind}"),
        )
        return Cat(f"{ours}.mixer.qkv.{kind}", sources, (mixer.heads * width, groups * width, groups * width))

    def gate_up(kind: str) -> Cat:
        sources = (Copy(f"{theirs}.ffn_gate.{kind}"), Copy(f"{theirs}.ffn_up.{kind}"))
        return Cat(f"{ours}.channel.gate_up.{kind}", sources, (channel.hidden, channel.hidden))

    rows: list[Rule] = [
        copy(f"{theirs}.attn_norm.weight", f"{ours}.mixer_norm.weight"),
        copy(f"{theirs}.ffn_norm.weight", f"{ours}.channel_norm.weight"),
        qkv("weight"),
        copy(f"{theirs}.attn_output.weight", f"{ours}.mixer.out.weight"),
        gate_up("weight"),
        copy(f"{theirs}.ffn_down.weight", f"{ours}.channel.down.weight"),
        Drop(f"{theirs}.attn_rot_embd.weight"),
    ]
    if mixer.qkv_bias:
        rows.append(qkv("bias"))
    if mixer.out_bias:
        rows.append(copy(f"{theirs}.attn_output.bias", f"{ours}.mixer.out.bias"))
    if channel.bias:
        rows += [gate_up("bias"), copy(f"{theirs}.ffn_down.bias", f"{ours}.channel.down.bias")]
    return rows
