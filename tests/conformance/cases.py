"""What the conformance suite runs over: small examples of every registered mixer and channel, and hybrids of them.

A new mixer or channel adds a line here and gets the whole suite. `test_registry.py` fails where one is forgotten.
"""

from typing import Any

import torch
import yaml
from torch import Tensor

from weft.nn import Model, build
from weft.spec import ModelSpec, model_spec

VOCAB, DIM, LENGTH, BATCH, CHUNK = 31, 16, 45, 3, 7
MEMORY = 9

MIXERS: dict[str, dict[str, Any]] = {
    "mha": {"type": "attention", "heads": 4},
    "gqa": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}, "qkv_bias": True, "out_bias": True},
    "mqa": {"type": "attention", "heads": 3, "kv_heads": 1, "head_dim": 6, "rope": {"base": 100.0}},
    "qk_norm": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}, "qk_norm": {"type": "rms"}},
    "softcap": {"type": "attention", "heads": 4, "softcap": 2.0, "scale": 0.3},
    "window": {"type": "attention", "heads": 4, "kv_heads": 2, "window": 6, "rope": {}},
    "window_softcap": {"type": "attention", "heads": 2, "window": 5, "softcap": 3.0},
    "sink_logits": {"type": "attention", "heads": 3, "head_dim": 6, "rope": {}, "window": 19, "sink_logits": True},
    "strided": {"type": "attention", "heads": 4, "pattern": {"type": "strided", "stride": 5}},
    "fixed": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}, "pattern": {"type": "fixed", "stride": 6, "summary": 2}},
    "fixed_far": {"type": "attention", "heads": 4, "rope": {}, "pattern": {"type": "fixed", "stride": 4, "part": "far"}},
    "dilated": {
        "type": "attention",
        "heads": 4,
        "rope": {},
        "pattern": {"type": "dilated", "window": 3, "dilation": 4, "global_tokens": 3},
    },
    "streaming": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}, "pattern": {"type": "streaming", "window": 6, "sinks": 3}},
    "entmax": {"type": "entmax_attention", "heads": 4, "kv_heads": 2, "rope": {}, "out_bias": True},
    "entmax_bisected": {"type": "entmax_attention", "heads": 3, "kv_heads": 1, "head_dim": 6, "alpha": 1.3, "qk_norm": {"type": "rms"}},
    "entmax_learned": {"type": "entmax_attention", "heads": 4, "kv_heads": 2, "learn_alpha": True, "window": 6, "rope": {}},
    "entmax_sparse": {"type": "entmax_attention", "heads": 4, "alpha": 2.0, "pattern": {"type": "strided", "stride": 5}},
    "cross": {"type": "cross_attention", "heads": 4, "kv_heads": 2, "memory_length": MEMORY, "memory_dim": 10},
    "mla": {"type": "latent_attention", "heads": 4, "kv_rank": 9, "nope_head_dim": 5, "rope_head_dim": 4, "v_head_dim": 3},
    "mla_queries": {"type": "latent_attention", "heads": 3, "kv_rank": 6, "q_rank": 7, "nope_head_dim": 4, "rope_head_dim": 2},
    "lstm": {"type": "lstm"},
    "lstm_wide": {"type": "lstm", "hidden": 20},
    "gru": {"type": "gru"},
    "mamba": {"type": "mamba", "state_dim": 4},
    "mamba_short": {"type": "mamba", "state_dim": 3, "conv": 2, "expand": 1, "bias": True, "conv_bias": False},
}
CHANNELS: dict[str, dict[str, Any]] = {
    "mlp": {"type": "mlp", "hidden": 24, "activation": "gelu"},
    "mlp_relu2": {"type": "mlp", "hidden": 24, "activation": "relu2", "bias": False},
    "gated": {"type": "gated", "hidden": 24},
    "rwkv_channel_mix": {"type": "rwkv_channel_mix", "hidden": 24},
    "experts": {"type": "experts", "experts": 5, "top_k": 2, "hidden": 12, "balance_loss": 0.01, "capacity": 1.0},
    "experts_grouped": {
        "type": "experts",
        "experts": 6,
        "top_k": 2,
        "hidden": 12,
        "shared": 2,
        "score": "sigmoid",
        "groups": 3,
        "top_groups": 2,
        "group_score": "top2",
        "scale": 2.5,
        "choice_bias": True,
    },
}
HYBRID = """
vocab: 31
dim: 16
context: 64
init_std: 0.3
norm: {type: rms}
position: {type: none}
layers:
  - repeat: 2
    layers:
      - mixer: {type: attention, heads: 4, kv_heads: 2, rope: {base: 10000}}
        channel: {type: gated, hidden: 24}
      - mixer: {type: attention, heads: 4, kv_heads: 1, window: 6, rope: {base: 10000}}
        channel: {type: rwkv_channel_mix, hidden: 24}
      - mixer: {type: latent_attention, heads: 4, kv_rank: 8, q_rank: 6, nope_head_dim: 4, rope_head_dim: 4}
      - mixer: {type: mamba, state_dim: 4}
      - mixer: {type: lstm}
        channel: {type: mlp, hidden: 24}
"""


def _model(*layers: dict[str, Any], **fields: Any) -> ModelSpec:
    # Large initial weights, so that a wrong state shows in the outputs instead of drowning in the residual stream.
    return model_spec({"vocab": VOCAB, "dim": DIM, "context": 64, "init_std": 0.3, "layers": layers, **fields})


def _specs() -> dict[str, ModelSpec]:
    specs = {name: _model({"mixer": mixer}, {"mixer": mixer}) for name, mixer in MIXERS.items()}
    specs |= {name: _model({"mixer": MIXERS["gqa"], "channel": channel}) for name, channel in CHANNELS.items()}
    for topology in ("pre", "post", "sandwich", "parallel"):
        layer = {"topology": topology, "mixer": MIXERS["gqa"], "cross": MIXERS["cross"], "channel": CHANNELS["rwkv_channel_mix"]}
        specs[topology] = _model({**layer, "repeat": 2})
    specs["learned"] = _model({"mixer": MIXERS["mha"]}, position={"type": "learned", "length": 64}, scale_embeddings=True)
    specs["sinusoidal"] = _model({"mixer": MIXERS["mha"]}, position={"type": "sinusoidal"}, tie_embeddings=False, head_bias=True)
    specs["hybrid"] = model_spec(yaml.safe_load(HYBRID))
    everything = [{"mixer": mixer, "channel": CHANNELS["rwkv_channel_mix"]} for mixer in MIXERS.values()]
    specs["everything"] = _model(*everything, logit_softcap=20.0)
    return specs


SPECS = _specs()
NAMES = list(SPECS)
# Compiling takes seconds a name, so that not every variant of a part is compiled.
COMPILED = ["gqa", "window", "cross", "lstm", "gru", "mamba", "rwkv_channel_mix", "softcap", "hybrid", "experts_grouped"]


def make(name: str, dtype: torch.dtype = torch.float64) -> Model:
    return build(SPECS[name], dtype=dtype, seed=0).eval()


def make_tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_memory(batch: int = BATCH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A ragged memory for cross-attention; models without it ignore it."""
    entries = torch.randn(batch, MEMORY, 10, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return entries, torch.tensor([MEMORY, 4, 1, 6, 2, 9, 3])[:batch]
