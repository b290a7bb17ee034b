"""Which weights of a model are matrices between channels, which are tables, and which are vectors: they are trained differently."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from weft.nn import Model
from weft.nn.adapters import adapter_parameters

Kind = Literal["matrix", "head", "table", "vector", "factor"]


@dataclass(frozen=True)
class Weight:
    """A trained parameter by its name in the model.

    kind  "matrix": a linear map inside a block. "head": an untied output matrix, or a score head's. "table": embeddings, token or position.
          "vector": norms, biases, convolution taps, state-space constants: whatever is not a map between channels.
          "factor": a matrix of an adapter. Its product with another is what changes, so that it is no map to be orthogonalised by itself.
    rows  of a matrix: how many rows each of the matrices fused in it has (queries, keys, values; gate, up; those of every expert).
    """

    name: str
    parameter: nn.Parameter
    kind: Kind
    rows: tuple[int, ...] = ()


def trained_weights(model: Model) -> list[Weight]:
    """Every parameter that requires a gradient, in the model's order, a tied one once."""
    fused = dict(_fused(model))
    layers = [*model.blocks.named_modules(prefix="blocks"), *model.mtp.named_modules(prefix="mtp")]
    linear = {f"{name}.weight" for name, module in layers if isinstance(module, nn.Linear)}
    adapter = adapter_parameters(model)
    weights = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in fused or name in linear:
            weights.append(Weight(name, parameter, "matrix", fused.get(name, (parameter.shape[0],))))
        elif name in ("head.weight", "score.weight"):
            weights.append(Weight(name, parameter, "head"))
        elif name in ("embed.weight", "position.weight"):
            weights.append(Weight(name, parameter, "table"))
        elif parameter.dim() == 2 and name in adapter:
            weights.append(Weight(name, parameter, "table" if name.startswith("virtual.") else "factor"))
        else:
            weights.append(Weight(name, parameter, "vector"))
    return weights


def _fused(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    there = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        rows = getattr(module, "fused_rows", None)
        if callable(rows):
            for name, sizes in rows().items():
                if f"{prefix}.{name}" not in there:  # packed, so that nobody trains it
                    continue
                parameter = module.get_parameter(name)
                assert sum(sizes) == parameter.numel() // parameter.shape[-1], f"{prefix}.{name}"
                yield f"{prefix}.{name}", sizes
