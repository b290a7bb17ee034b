"""Loading streams: memory beyond the imports stays under 1.2 times the weights, for files of 200 MB and more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weft.nn import build
from weft.spec import ModelSpec, model_spec
from weft.weights.save import save_model

MEASURE = """
import json, sys
import torch
from weft.weights.load import load_model

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.zeros(1000, 1000) @ torch.zeros(1000, 1000)
before = peak()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2])).model
weights = sum(parameter.nbytes for parameter in model.parameters())
if sys.argv[3:] == ["twice"]:
    second = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
print(json.dumps({"ratio": (peak() - before) / weights, "weights": weights}))
"""


def measure(path: Path, dtype: str, *more: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path), dtype, *more], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def llama(tied: bool) -> ModelSpec:
    """A large vocabulary on a small body, as in Llama 3.2 1B and SmolLM2: the embedding is a fifth to a half of all weights."""
    mixer = {"type": "attention", "heads": 8, "kv_heads": 2, "rope": {}}
    block = {"repeat": 6, "mixer": mixer, "channel": {"type": "gated", "hidden": 2048}}
    return model_spec({"vocab": 40000, "dim": 768, "norm": {"type": "rms"}, "tie_embeddings": tied, "layers": [block]})


def mixtral() -> ModelSpec:
    """Several tensors of the file for one parameter of each layer."""
    channel = {"type": "experts", "experts": 8, "top_k": 2, "hidden": 512}
    block = {"repeat": 6, "mixer": {"type": "attention", "heads": 8, "kv_heads": 2, "rope": {}}, "channel": channel}
    return model_spec({"vocab": 8000, "dim": 768, "norm": {"type": "rms"}, "tie_embeddings": False, "layers": [block]})


def gpt2() -> ModelSpec:
    """Matrices that lie transposed in the file."""
    mixer = {"type": "attention", "heads": 8, "qkv_bias": True, "out_bias": True}
    block = {"repeat": 6, "mixer": mixer, "channel": {"type": "mlp", "hidden": 3072}}
    position = {"type": "learned", "length": 1024}
    return model_spec({"vocab": 20000, "dim": 768, "context": 1024, "position": position, "layers": [block]})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize(
    ("spec", "stored", "wanted"),
    [
        (llama(True), torch.float32, "float32"),
        (llama(False), torch.float32, "float32"),
        (llama(False), torch.float32, "bfloat16"),
        (gpt2(), torch.float32, "float32"),
        (mixtral(), torch.float32, "bfloat16"),
    ],
    ids=["llama tied", "llama untied", "llama to bfloat16", "gpt2", "mixtral to bfloat16"],
)
def test_peak_memory_of_loading(spec: ModelSpec, stored: torch.dtype, wanted: str, tmp_path: Path) -> None:
    model = build(spec, dtype=stored)
    save_model(model, tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").stat().st_size > 200e6
    del model
    assert measure(tmp_path / "m", wanted)["ratio"] < 1.2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_the_measure_sees_a_second_copy(tmp_path: Path) -> None:
    save_model(build(llama(True)), tmp_path / "m")
    assert measure(tmp_path / "m", "float32", "twice")["ratio"] > 1.8
