"""LoRA in one step of training against its parts one after the other: outputs and all gradients, upon float and packed weights."""

import pytest
import torch

from weft.nn import build
from weft.nn.adapters import attach
from weft.nn.adapters.lora import LoRAAdapter
from weft.quant import quantize
from weft.spec import Quant, model_spec
from weft.spec.adapters import LoRA
from weft.weights.adapter_places import choose_places
from weft.zoo import FAMILIES

SPEC = {
    "vocab": 50,
    "dim": 64,
    "init_std": 0.15,
    "norm": {"type": "rms"},
    "layers": [
        {
            "repeat": 2,
            "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}},
            "channel": {"type": "gated", "hidden": 128},
        }
    ],
}


def adapted(quant, targets, dtype=torch.float64):
    model = build(model_spec(SPEC), seed=3)
    model = (quantize(model, quant) if quant is not None else model).to(dtype)
    settings = LoRA(rank=3, alpha=5, targets=targets)
    attach(model, settings, choose_places(model, FAMILIES["llama"], settings), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model.train()


def run(model):
    model.zero_grad()
    hidden = model(torch.arange(33).view(3, 11)).hidden
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("targets", ["all", ("v_proj",), ("q_proj", "v_proj", "up_proj", "down_proj")], ids=["all", "one", "some"])
@pytest.mark.parametrize("quant", [None, Quant(type="int8"), Quant(type="nf4", double=True)], ids=["float", "int8", "nf4"])
def test_one_step_is_its_parts(quant, targets, monkeypatch):
    model = adapted(quant, targets)
    hidden, gradients = run(model)
    monkeypatch.setattr(LoRAAdapter, "_in_one_step", False)
    want, wanted = run(model)
    torch.testing.assert_close(hidden, want, rtol=0, atol=1e-10)
    assert gradients.keys() == wanted.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-10)
        assert gradient.abs().max() > 1e-4, f"control: {name} has a gradient"
    model.adapters.off = True
    assert (run_off(model) - want).abs().max() > 1e-2, "control: the adapter does something"


@torch.no_grad()
def run_off(model):
    return model(torch.arange(33).view(3, 11)).hidden


def test_recomputing_blocks_and_narrow_products_change_nothing_else(monkeypatch):
    model = adapted(None, "all", torch.float32)
    _, plain = run(model)
    model.gradient_checkpointing = True
    _, again = run(model)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    with torch.autocast("cpu", torch.bfloat16):
        _, narrow = run(model)
        monkeypatch.setattr(LoRAAdapter, "_in_one_step", False)
        _, parts = run(model)
    for name, gradient in narrow.items():
        assert gradient.dtype == torch.float32
        assert (gradient - parts[name]).norm() < 0.05 * parts[name].norm(), name
