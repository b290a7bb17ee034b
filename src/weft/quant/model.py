"""Quantises a model: the same spec with `quant`, every matrix it names rounded, everything else copied."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from weft.nn import Model, Step, build, materialise
from weft.nn.linear import Linear
from weft.nn.packed import PackedWeight
from weft.quant.gptq import round_with_compensation
from weft.quant.rounding import round_to_nearest
from weft.spec import ModelSpec, Quant

Method = Literal["rtn", "gptq"]
METHODS = ("rtn", "gptq")
# Layers done, and layers in all.
Progress = Callable[[int, int], None]


@torch.no_grad()
def quantize(
    model: Model, quant: Quant, method: Method = "rtn", calibration: Sequence[Sequence[int]] = (), progress: Progress = lambda _, __: None
) -> Model:
    """A copy of a float model with the matrices that `quant` names in fewer bits; it computes in float32.

    method       "rtn" rounds to nearest; "gptq" takes into account what the model sees on the `calibration` texts (token ids, all of one
                 length), layer by layer, each layer reading what the quantised ones before it wrote. It changes `model`'s own weights
                 to what they became.
    """
    assert model.spec.quant is None, "the model is quantised already"
    assert model.adapters is None, "an adapter has to be merged first"
    assert method == "rtn" or calibration, "gptq needs calibration texts"
    spec = ModelSpec.model_validate({**model.spec.model_dump(), "quant": quant})
    made = materialise(build(spec, "meta", torch.float32), model.device)
    copied = model.state_dict()
    for name, tensor in made.state_dict().items():
        if name in copied:
            tensor.copy_(copied[name])
    packed = {name: module for name, module in made.named_modules() if isinstance(module, PackedWeight)}
    for name, module in packed.items():
        if not name.startswith("blocks."):  # tables in 8 bits; modules for multi-token prediction, which guess, without calibration
            module.fill(*round_to_nearest(copied[name].flatten(0, -2), module.quant))
    states = _Calibration(model, calibration) if method == "gptq" else None
    for i in range(len(model.blocks)):
        own = {name: module for name, module in packed.items() if name.startswith(f"blocks.{i}.")}
        moments = states.moments(i) if states is not None else {}
        for name, module in own.items():
            weight, seen = copied[name].flatten(0, -2), moments.get(name)  # of experts, all rows one below the other; calibration sees none
            codes = round_to_nearest(weight, quant) if seen is None else round_with_compensation(weight, seen, quant)
            module.fill(*codes)
            if states is not None:
                weight.copy_(module.dequantise(torch.float32))
        if states is not None:
            states.advance(i)
        progress(i + 1, len(model.blocks))
    return made.eval()


@torch.no_grad()
def dequantize(model: Model) -> Model:
    """The same model with every packed weight written out in float32: what the packed one computes with, and no more."""
    assert model.adapters is None, "an adapter would be lost"
    plain = build(ModelSpec.model_validate({**model.spec.model_dump(), "quant": None}), "meta", torch.float32)
    made = materialise(plain, model.device)
    own, stored = dict(model.named_modules()), model.state_dict()
    for name, tensor in made.state_dict().items():
        packed = own.get(name)
        tensor.copy_(packed.dequantise().view_as(tensor) if isinstance(packed, PackedWeight) else stored[name])
    return made.eval()


class _Calibration:
    """What the layers see on the calibration texts."""

    def __init__(self, model: Model, texts: Sequence[Sequence[int]]) -> None:
        self.model = model.eval()
        tokens = torch.tensor([list(text) for text in texts], device=model.device)
        self.step = Step.parallel(tokens)
        self.hidden = model.enter(tokens, self.step)

    def moments(self, layer: int) -> dict[str, Tensor]:
        """Second moments of the inputs of each matrix of a layer, by the name of its weight."""
        found: dict[str, Tensor] = {}
        handles = []
        for name, module in self.model.blocks[layer].named_modules():
            if isinstance(module, Linear):
                handles.append(module.register_forward_hook(_collector(found, f"blocks.{layer}.{name}.weight")))
        try:
            self._run(layer)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def advance(self, layer: int) -> None:
        self.hidden = self._run(layer)

    def _run(self, layer: int) -> Tensor:
        # One row at a time: what a layer holds for all of them may be large.
        rows = [self.model.blocks[layer](row[None], Step.parallel(self.step.positions[:1]), None)[0] for row in self.hidden]
        return torch.cat(rows)


def _collector(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def collect(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        found[name] = found.get(name, 0.0) + x.T @ x

    return collect
