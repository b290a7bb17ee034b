"""Training a part of a model as it is: biases alone, or the last layers."""

from weft.errors import UserError, nearest
from weft.nn.model import Model
from weft.spec.adapters import BitFit, Freeze


def train_partly(model: Model, settings: BitFit | Freeze) -> None:
    """Let the parameters that the settings name require a gradient, and no others. Raises UserError where there are none."""
    names = [name for name, _ in model.named_parameters()]
    chosen = _biases(names) if isinstance(settings, BitFit) else _named(names, settings, len(model.blocks))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def _biases(names: list[str]) -> set[str]:
    chosen = {name for name in names if "bias" in name.rsplit(".", 1)[-1]}
    if not chosen:
        raise UserError("adapter is bitfit, which trains biases, but this model has none; take lora or ia3.")
    return chosen


def _named(names: list[str], settings: Freeze, layers: int) -> set[str]:
    prefixes: list[str] = []
    if settings.layers is not None:
        if settings.layers > layers:
            raise UserError(f"adapter.layers is {settings.layers} but the model has {layers} layers; give at most as many.")
        prefixes = [f"blocks.{i}." for i in range(layers - settings.layers, layers)] + ["norm."]
    chosen = {name for name in names if name.startswith(tuple(prefixes))} if prefixes else set()
    for part in settings.parts:
        found = {name for name in names if f".{part}." in f".{name}."}
        if not found:
            words = sorted({word for name in names for word in (name, name.rsplit(".", 1)[0], *name.split("."))})
            raise UserError(f"adapter.parts has '{part}', but no parameter of the model has that in its name.{nearest(part, words)}")
        chosen |= found
    return chosen
