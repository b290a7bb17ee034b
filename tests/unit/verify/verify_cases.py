"""Small models to verify: Llama-shaped, Mistral-shaped with a ring that wraps, sparse patterns, and a hybrid with recurrent layers."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from weft.nn import build
from weft.spec import ModelSpec, model_spec
from weft.tokenizer import Tokenizer
from weft.tokenizer.train import train_tokenizer
from weft.verify import Check, Report, verify
from weft.weights.save import save_model

TEXT = "".join(f"On day {i} the river rose by {i * 7 % 13} cm, and def f(x): return x + {i} was all anybody said.\n" for i in range(80))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ATTENTION = {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}
GATED = {"type": "gated", "hidden": 48}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"repeat": 2, "mixer": ATTENTION, "channel": GATED}],
    "ring": [{"repeat": 2, "mixer": {**ATTENTION, "window": 11}, "channel": GATED}],
    "sparse": [
        {"mixer": {**ATTENTION, "pattern": {"type": "streaming", "window": 9, "sinks": 3}, "sink_logits": True}, "channel": GATED},
        {"mixer": {**ATTENTION, "pattern": {"type": "dilated", "window": 4, "dilation": 3, "global_tokens": 2}}, "channel": GATED},
        {"mixer": {**ATTENTION, "pattern": {"type": "fixed", "stride": 8, "summary": 2}}, "channel": GATED},
        {"mixer": {**ATTENTION, "pattern": {"type": "strided", "stride": 6}}, "channel": GATED},
    ],
    "hybrid": [
        {"mixer": ATTENTION, "channel": GATED},
        {"mixer": {"type": "mamba", "state_dim": 4}},
        {"mixer": {**ATTENTION, "window": 7}, "channel": {"type": "rwkv_channel_mix", "hidden": 32}},
        {"mixer": {"type": "lstm"}, "channel": GATED},
        {"mixer": {"type": "gru"}},
    ],
}


@lru_cache
def tokenizer() -> Tokenizer:
    """256 bytes and what TEXT has, with a BOS that is put before every text and that the chat template writes too."""
    made = train_tokenizer("unigram", [TEXT], 480)
    made.settings = replace(made.settings, chat_templates={"default": TEMPLATE})
    return made


def spec(name: str) -> ModelSpec:
    sizes = {"vocab": tokenizer().vocab_size, "dim": 32, "context": 128, "init_std": 0.3, "tie_embeddings": False}
    return model_spec({**sizes, "norm": {"type": "rms"}, "layers": LAYERS[name]})


def folder(name: str, parent: Path) -> Path:
    """One of the models as a folder, random weights large enough for texts that differ."""
    return save_model(build(spec(name), seed=2), parent / name, tokenizer())


def checks(source: Path, dtype: str = "float32") -> dict[str, Check]:
    return {check.name: check for check in run(source, dtype).checks}


def run(source: Path, dtype: str = "float32") -> Report:
    return verify(source, device="cpu", dtype=dtype, quick=True)


def failing(source: Path, dtype: str = "float32") -> list[str]:
    return [name for name, check in checks(source, dtype).items() if check.outcome.status == "fail"]
