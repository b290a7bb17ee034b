"""Adapters: a few new parameters beside a frozen model, attached in place and taken off again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from weft.errors import UserError
from weft.nn.adapters.bottleneck import BottleneckAdapter
from weft.nn.adapters.ia3 import IA3Adapter
from weft.nn.adapters.lora import LoRAAdapter
from weft.nn.adapters.partial import train_partly
from weft.nn.adapters.shared import Adapters, Place
from weft.nn.adapters.virtual import attach_virtual
from weft.nn.attention import Attention
from weft.nn.linear import Linear
from weft.nn.model import Model
from weft.spec.adapters import IA3, AdapterSettings, BitFit, Bottleneck, Freeze, LoRA

__all__ = ["Adapters", "Place", "adapter_parameters", "adapters_off", "attach", "detach", "has_adapter", "merge_adapter"]


def attach(model: Model, settings: AdapterSettings, places: Sequence[Place] = (), seed: int = 0, text: Sequence[int] = ()) -> Model:
    """Put an adapter on a model, in place: everything else is frozen. The model computes what it computed, to the bit, until it is trained;
    with virtual tokens, what it computed behind the tokens that they begin as.

    places  the linear maps that LoRA and IA3 change (`weft.weights.adapter_places` finds them).
    seed    of what starts at random.
    text    token ids that virtual tokens begin as, over and over; without any they are drawn from the vocabulary.

    Adapter parameters are float32, or float64 in a model of float64, whatever the base is kept in. Raises UserError where the model has an
    adapter already, or nothing that this one could be put on.
    """
    if model.adapters is not None:
        raise UserError(f"the model has an adapter ({model.adapters.settings.type}) already; merge it into the model first.")
    if isinstance(settings, BitFit | Freeze):
        train_partly(model, settings)
        return model
    shared = Adapters(settings, tuple(places))
    like = torch.empty(0, dtype=torch.float64 if model.dtype == torch.float64 else torch.float32, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    if isinstance(settings, LoRA | IA3):
        _attach_linear(model, shared, like)
    elif isinstance(settings, Bottleneck):
        _attach_behind(model, settings, shared, like)
    else:
        drawn = torch.randint(model.spec.vocab, (settings.tokens,), generator=generator)
        ids = torch.tensor([text[i % len(text)] for i in range(settings.tokens)]) if text else drawn
        attach_virtual(model, settings, ids.to(model.device), like)
    for module in model.modules():
        draw = getattr(module, "draw", None)
        if callable(draw):
            draw(generator)
    model.set_adapters(shared)
    return model


def _attach_linear(model: Model, shared: Adapters, like: Tensor) -> None:
    assert shared.places
    settings = shared.settings
    for name, group in groupby(sorted(shared.places, key=lambda place: (place.module, place.start)), lambda place: place.module):
        linear, here = model.get_submodule(name), list(group)
        assert isinstance(linear, Linear)
        if isinstance(settings, LoRA):
            linear.adapter = LoRAAdapter(linear, here, settings, shared, like)
        else:
            assert isinstance(settings, IA3)
            linear.adapter = IA3Adapter(linear, here, [place.scales_input for place in here], shared, like)


def _attach_behind(model: Model, settings: Bottleneck, shared: Adapters, like: Tensor) -> None:
    sites = [(block, part) for block in model.layers() for part in settings.parts if part in block.names]
    if not sites:
        raise UserError(f"adapter.parts is {', '.join(settings.parts)}, but no layer of the model has such a part.")
    for block, part in sites:
        block.add_behind(part, BottleneckAdapter(model.spec.dim, settings, shared, like))


def detach(model: Model) -> Model:
    """Take a model's adapter off, in place; its base can be trained again."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.take_off()
    for block in model.layers():
        block.behind = None
        for part in block.parts().values():
            if isinstance(part, Attention):
                part.prefix = None
    model.virtual = None
    model.set_adapters(None)
    model.requires_grad_(True)
    return model


def has_adapter(model: Model) -> bool:
    """Whether a model has an adapter that `adapters_off` leaves out, so that its base is there beside it. Virtual tokens are not left out:
    they are part of the text, and a reference for such a model is a frozen copy."""
    return model.adapters is not None and isinstance(model.adapters.settings, LoRA | IA3 | Bottleneck)


@contextmanager
def adapters_off(model: Model) -> Iterator[Model]:
    """Within, the model is its base: a reference for a policy that is trained through an adapter."""
    shared = model.adapters
    if shared is None:
        yield model
        return
    before, shared.off = shared.off, True
    try:
        yield model
    finally:
        shared.off = before


def adapter_parameters(model: Model) -> dict[str, Tensor]:
    """The parameters of a model's adapter by name."""
    return {name: parameter for name, parameter in model.named_parameters() if _is_adapters(name)}


def _is_adapters(name: str) -> bool:
    return ".adapter." in name or ".behind." in name or name.startswith("virtual.")


@torch.no_grad()
def merge_adapter(model: Model) -> Model:
    """Work a model's adapter into its weights, in place, in float32 (float64 stays), and take it off.

    Raises UserError for a form that is no change of weights, and where a weight is quantised and cannot hold the sum.
    """
    shared = model.adapters
    if shared is None:
        raise UserError("the model has no adapter to merge.")
    if not isinstance(shared.settings, LoRA | IA3) or shared.names:
        what = "several adapters side by side" if shared.names else f"an adapter of the form {shared.settings.type}"
        raise UserError(f"{what} cannot be merged into the weights: only one lora or ia3 adapter can. Use the adapter beside its base.")
    names = dict.fromkeys(place.module for place in shared.places)
    linears = [(name, module) for name, module in model.named_modules() if name in names and isinstance(module, Linear)]
    for name, linear in linears:
        if linear.packed:
            raise UserError(
                f"{name} is stored in {model.spec.quant.type if model.spec.quant else 'few'} and cannot hold the adapter's change exactly; "
                "merge into the model before it was quantised."
            )
    for _, linear in linears:
        adapter = linear.adapter
        assert isinstance(adapter, LoRAAdapter | IA3Adapter)
        wide = linear.weight.to(torch.float64 if linear.weight.dtype == torch.float64 else torch.float32)
        weight, bias = adapter.merged(linear, wide)
        linear.weight.copy_(weight)
        if bias is not None and linear.bias is not None:
            linear.bias.copy_(bias)
    return detach(model)
