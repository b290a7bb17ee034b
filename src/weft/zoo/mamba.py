"""Mamba (Gu and Dao 2023): selective state spaces alone, no attention and no channel mixing."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.spec import Block, Mamba, ModelSpec, RMSNorm
from weft.zoo.config import ConfigReader
from weft.zoo.decoder import read_layers
from weft.zoo.family import Entry, Family, Inexpressible
from weft.zoo.rules import One, Reshape, Rule, copy, head

ARCHITECTURES = ("MambaForCausalLM", "MambaModel")

# How a fresh model is initialised, and which kernel trains it: nothing a loaded model's outputs depend on.
_WITHOUT_EFFECT = """
    fused_add_norm pad_vocab_size_multiple rescale_prenorm_residual residual_in_fp32 time_step_floor time_step_init_scheme
    time_step_max time_step_min time_step_scale use_associative_scan use_mambapy
"""


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    reader = ConfigReader(config, ARCHITECTURES)
    for key in _WITHOUT_EFFECT.split():
        reader.get(key)
    dim, layers, expand = reader.integer("hidden_size"), read_layers(reader), reader.integer("expand", 2)
    reader.only("hidden_act", "silu")
    reader.only("rms_norm", True)
    reader.only("ssm_cfg", {})
    reader.only("d_model", dim)
    reader.only("n_layer", layers)
    reader.only("intermediate_size", expand * dim)
    reader.only("d_inner", expand * dim)
    reader.only("layer_types", ["linear_attention"] * layers)
    automatic = reader.get("time_step_rank", "auto") == "auto"
    mixer = Mamba(
        expand=expand,
        state_dim=reader.integer("state_size", 16),
        conv=reader.integer("conv_kernel", 4),
        dt_rank=None if automatic else reader.integer("time_step_rank"),
        conv_bias=reader.flag("use_conv_bias", True),
        bias=reader.flag("use_bias", False),
    )
    norm = RMSNorm(eps=reader.number("layer_norm_epsilon", 1e-5))
    vocab, context = reader.integer("vocab_size"), reader.integer("max_position_embeddings", 2048)
    tied = reader.flag("tie_word_embeddings", True)
    reader.finish()
    return ModelSpec(vocab=vocab, dim=dim, context=context, norm=norm, tie_embeddings=tied, layers=(Block(repeat=layers, mixer=mixer),))


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """A Mamba has no longest sequence; the spec's context is kept under a key that transformers carries along."""
    mixer = spec.blocks()[0].mixer
    if not isinstance(mixer, Mamba) or not isinstance(spec.norm, RMSNorm):
        raise Inexpressible
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "num_hidden_layers": len(spec.blocks()),
        "expand": mixer.expand,
        "intermediate_size": mixer.inner(spec.dim),
        "state_size": mixer.state_dim,
        "conv_kernel": mixer.conv,
        "time_step_rank": mixer.rank(spec.dim),
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": spec.norm.eps,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tie_embeddings,
    }


def rules(spec: ModelSpec) -> list[Rule]:
    embedding = "backbone.embeddings.weight"
    rows: list[Rule] = [
        copy(embedding, "embed.weight", older=("backbone.embedding.weight",)),
        copy("backbone.norm_f.weight", "norm.weight"),
        head(spec.tie_embeddings, "lm_head.weight", embedding),
    ]
    for i, block in enumerate(spec.blocks()):
        assert isinstance(block.mixer, Mamba)
        rows += _layer(f"backbone.layers.{i}", f"blocks.{i}", block.mixer, spec.dim)
    return rows


def _layer(theirs: str, ours: str, mixer: Mamba, dim: int) -> list[Rule]:
    taps = Reshape(f"{theirs}.mixer.conv1d.weight", (mixer.inner(dim), 1, mixer.conv))
    same = ["in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D", "out_proj.weight"]
    if mixer.bias:
        same += ["in_proj.bias", "out_proj.bias"]
    rows: list[Rule] = [copy(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight"), One(f"{ours}.mixer.conv.weight", taps)]
    if mixer.conv_bias:
        rows.append(copy(f"{theirs}.mixer.conv1d.bias", f"{ours}.mixer.conv.bias"))
    return rows + [copy(f"{theirs}.mixer.{name}", f"{ours}.mixer.{name}") for name in same]


MAMBA = Family(
    name="mamba",
    model_type="mamba",
    architecture="MambaForCausalLM",
    prefix="backbone.",
    from_config=from_config,
    to_config=to_config,
    rules=rules,
)


def mamba(dim: int, layers: int) -> ModelSpec:
    return ModelSpec(vocab=50280, dim=dim, context=2048, norm=RMSNorm(), layers=(Block(repeat=layers, mixer=Mamba(conv=4)),))


def _row(size: str, dim: int, layers: int, published: int) -> Entry:
    source, repo = "tensor index of the Hugging Face repo", f"state-spaces/mamba-{size}-hf"
    return Entry(f"mamba-{size}", "mamba", partial(mamba, dim, layers), published, source, repo)


ENTRIES = (
    _row("130m", 768, 24, 129_135_360),
    _row("370m", 1024, 48, 371_516_416),
    _row("790m", 1536, 48, 793_204_224),
    _row("1.4b", 2048, 48, 1_372_178_432),
    _row("2.8b", 2560, 64, 2_768_345_600),
)
