"""From a model on disk to a quantised one on disk, with the report of what it cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from weft.errors import UserError
from weft.files import read_text
from weft.nn import Model
from weft.nn.linear import num_plain
from weft.nn.packed import PackedWeight
from weft.nn.router import Router
from weft.quant.drift import Drift, Reference
from weft.quant.model import Method, Progress, quantize
from weft.spec import Quant
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.weights.load import load_weights, open_checkpoint
from weft.weights.save import check_replaceable, save_model

CALIBRATION = (24, 256)  # rows, and tokens of each at most
MEASURED = 512  # tokens, from the end of the text


@dataclass(frozen=True)
class Quantized:
    """A quantised model that was written: its folder, the bytes of all its weights, stored bits a weight in the quantised matrices, how
    many those are and how many stayed, and the drift."""

    path: Path
    bytes: int
    bits: float
    matrices: int
    kept: int
    method: Method
    drift: Drift

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "drift": self.drift.as_dict()}


def quantize_folder(source: Path, quant: Quant, out: Path, method: Method, text: Path | None, progress: Progress) -> Quantized:
    """Read a model, round it, measure it on held-out text, and write it as a folder that Weft loads.

    Raises UserError for a model that is quantised already in Weft's own format, a text that is too short, and a folder that holds
    something else.
    """
    check_replaceable(out)
    checkpoint = open_checkpoint(source)
    if checkpoint.adapter is not None:
        raise UserError(f"{source} is an adapter and no model; work it into its base first: weft merge adapter {source} -o OUT")
    if checkpoint.spec.quant is not None:
        raise UserError(f"{source} is quantised to {checkpoint.spec.quant.type} already; give the model it was made from.")
    tokenizer = load_tokenizer(checkpoint.path)
    ids = tokenizer.encode(read_text(text, "text") if text is not None else documentation())
    context = min(checkpoint.spec.context, CALIBRATION[1])
    measured = ids[-min(MEASURED, checkpoint.spec.context) :]
    rows = _rows(ids[: -len(measured)], context)
    if len(measured) < min(32, checkpoint.spec.context) or (method == "gptq" and not rows):
        raise UserError(f"{text} has {len(ids)} tokens; give a text of at least {context + 64}, better ten thousand.")
    model = load_weights(checkpoint, dtype=torch.float32)
    reference = Reference(model, measured, len(tokenizer.decode(measured[1:]).encode()))
    made = quantize(model, quant, method, rows, progress)
    drift = reference.drift(made)
    return _save(made, out, tokenizer, method, drift)


def _save(made: Model, out: Path, tokenizer: Tokenizer, method: Method, drift: Drift) -> Quantized:
    save_model(made, out, tokenizer)
    packed = [module for module in made.modules() if isinstance(module, PackedWeight)]
    kept = sum(num_plain(module) + isinstance(module, Router) for module in made.modules())
    size = sum(module.num_bytes for module in packed)
    rest = sum(parameter.numel() * parameter.element_size() for parameter in made.parameters())
    bits = 8 * size / max(1, sum(module.numel() for module in packed))
    return Quantized(out, size + rest, bits, len(packed), kept, method, drift)


def documentation() -> str:
    """English and code that every Python brings along: the texts of its `help`."""
    from pydoc_data import topics

    return "\n".join(text for _, text in sorted(topics.topics.items()))[:400_000]


def _rows(ids: Sequence[int], length: int) -> list[Sequence[int]]:
    """Stretches of equal length, spread over the text."""
    count = min(CALIBRATION[0], len(ids) // length)
    step = len(ids) // count if count else 0
    return [ids[i * step : i * step + length] for i in range(count)]
