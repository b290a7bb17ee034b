"""A model saved with a tokenizer trained here: transformers reads both, GGUF carries both, llama.cpp agrees where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from weft.nn import Model, build
from weft.spec import model_spec
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.tokenizer.train import train_tokenizer
from weft.weights.export import export
from weft.weights.fidelity import PROBES
from weft.weights.load import load_model
from weft.weights.save import save_model

TEXT = ["def add(first, second):\n    return first + second\n\n\nclass Point:\n    pass\n", *PROBES] * 3
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", TEXT, 400)


def trained(vocab: int, scaling: dict[str, object] | None = None, bias: bool = False, **changes: object) -> Model:
    """A Llama whose weights are large enough to speak with conviction."""
    rope = {"base": 5000.0, "scaling": scaling}
    mixer = {"type": "attention", "heads": 4, "kv_heads": 2, "rope": rope, "qkv_bias": bias, "out_bias": bias}
    layers = [{"repeat": 3, "mixer": mixer, "channel": {"type": "gated", "hidden": 96, "bias": bias}}]
    sizes = {"vocab": vocab, "dim": 64, "context": 64, "norm": {"type": "rms"}, "layers": layers, **changes}
    model = build(model_spec(sizes), seed=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.sin(torch.arange(parameter.numel())))
    return model


def test_transformers_reads_model_and_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = trained(tokenizer.vocab_size + 5)
    save_model(model, tmp_path / "m", tokenizer)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["eos_token_id"] == tokenizer.eos_id == json.loads((tmp_path / "m/generation_config.json").read_text())["eos_token_id"]
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = [tokenizer.encode(text) for text in PROBES]
    assert [theirs.encode(text, add_special_tokens=False) for text in PROBES[:-5]] == ids[:-5]
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert again.generation_config.eos_token_id == tokenizer.eos_id
    batch = torch.tensor([ids[0][:16]])
    with torch.no_grad():
        assert (again(batch).logits - model(batch).logits).abs().max() < TOLERANCE
    assert load_tokenizer(tmp_path / "m").encode(PROBES[3]) == ids[3]


def test_a_tokenizer_trained_here_travels_into_gguf(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(trained(tokenizer.vocab_size + 5), tmp_path / "m", tokenizer)
    assert export(tmp_path / "m", "gguf", tmp_path / "m.gguf", "f16").tokenizer
    copy = load_tokenizer(tmp_path / "m.gguf")
    assert [copy.encode(text) for text in TEXT] == [tokenizer.encode(text) for text in TEXT]
    assert (copy.eos_id, copy.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size + 5)


@pytest.mark.parametrize(
    ("scaling", "changes"),
    [
        (None, {}),
        (None, {"tie_embeddings": False}),
        (None, {"bias": True}),
        ({"type": "linear", "factor": 4.0}, {}),
        ({"type": "llama3", "factor": 8.0, "original_context": 16}, {}),
        ({"type": "yarn", "factor": 4.0, "original_context": 16}, {}),
    ],
    ids=["tied", "untied", "biased", "linear", "llama3", "yarn"],
)
def test_llama_cpp_agrees(tokenizer: Tokenizer, scaling: dict[str, object] | None, changes: dict[str, Any], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is built from source")
    model = trained(tokenizer.vocab_size + 5, scaling, **changes)
    save_model(model, tmp_path / "m", tokenizer)
    assert export(tmp_path / "m", "gguf", tmp_path / "m.gguf", "f32").llama_cpp is not None
    other = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    text = "def point(first):\n    return first\n"
    ids = tokenizer.encode(text)
    assert other.tokenize(text.encode(), add_bos=False, special=False) == ids
    ids = (ids * 3)[:50]
    other.eval(ids)
    with torch.no_grad():
        expected = load_model(tmp_path / "m").model(torch.tensor([ids])).logits[0]
    given = torch.tensor(other.scores[: len(ids)])
    # llama.cpp keeps keys and values in 16 bits
    assert (given - expected).abs().max() < 2e-2 * expected.abs().max()
    assert (given.roll(1, 0) - expected).abs().max() > 0.5 * expected.abs().max()
