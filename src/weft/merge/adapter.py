"""An adapter made part of the model it was trained upon, with what that changed measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import UserError
from weft.files import atomic_folder
from weft.nn import Model
from weft.nn.adapters import merge_adapter
from weft.quant import dequantize
from weft.verify.prompts import built_in
from weft.weights.adapter_files import put_adapter
from weft.weights.export import bring_tokenizer
from weft.weights.fidelity import tokenizer_of
from weft.weights.load import Checkpoint, load_weights, open_checkpoint, stored_dtype
from weft.weights.save import check_replaceable, write_folder

PROBED = 256  # tokens of the longest prompt
_FEW = ("Q2", "Q3", "Q4")  # how types of GGUF files with at most 4 bits a weight are called, IQ4_XS being one


@dataclass(frozen=True)
class MergedAdapter:
    """A model that was written, and how far its predictions are from the base's with the adapter beside it: mean KL divergence in nats a
    token, and the largest change of a logit, over `tokens` tokens of prompts. `moved` is how far the adapter itself takes the base, as a KL
    divergence: what the others are to be compared with."""

    path: str
    adapter: str
    base: str
    dtype: str
    kl: float
    max_logit_change: float
    moved: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def merge_into_base(
    adapter: Path, out: Path, base: str | None = None, dtype: torch.dtype | None = None, force: bool = False
) -> MergedAdapter:
    """Add an adapter to the weights of its base in float32, round them to `dtype` (None: as the base is stored), and write the sum.

    base   the model, where it is not the one that the adapter names.
    force  take a base in 4 bits too; its weights are written out in full.

    Raises UserError for an adapter that is no change of weights, an adapter for another model, and a base in 4 bits without `force`.
    """
    check_replaceable(out)
    checkpoint = open_checkpoint(adapter) if base is None else open_checkpoint(base, adapter)
    if checkpoint.adapter is None:
        raise UserError(f"{adapter} is a model and no adapter; give the folder that holds adapter_config.json.")
    if not force and (kind := _four_bits(checkpoint)):
        raise UserError(
            f"the base {checkpoint.source} is stored in {kind}, which cannot hold the sum: rounding it again loses about as much as the "
            "adapter has learnt, and written out in full it takes several times the room. Give the model before it was quantised with "
            "--base, keep the adapter beside its base, or take the large model with --force."
        )
    model = load_weights(checkpoint.base, dtype=torch.float32)
    model = dequantize(model) if model.spec.quant is not None else model
    tokenizer = tokenizer_of(checkpoint.path)
    texts = [torch.tensor([prompt.ids]) for prompt in built_in(tokenizer, model.spec, 0, min(PROBED, model.spec.context))]
    plain = _logits(model, texts)
    put_adapter(model, checkpoint.adapter, checkpoint.family, checkpoint.source)
    beside = _logits(model, texts)
    merge_adapter(model)
    stored = dtype or _usual_dtype(checkpoint)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))
    within = _logits(model, texts)
    if not within.isfinite().all():
        raise UserError(f"the logits are not finite once {adapter} is merged; look whether the adapter or its base is damaged.")
    with atomic_folder(out) as partial:
        write_folder(model, partial, tokenizer, stored, family=checkpoint.family)
        bring_tokenizer(checkpoint, partial)
    change = float((within - beside).abs().max())
    name = str(stored).removeprefix("torch.")
    kl = _divergence(beside, within)
    return MergedAdapter(str(out), str(adapter), checkpoint.source, name, kl, change, _divergence(plain, beside), len(beside))


def _usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return torch.float32 if checkpoint.spec.quant is not None else stored_dtype(checkpoint)


def _four_bits(checkpoint: Checkpoint) -> str | None:
    """What a base in 4 bits or fewer is stored as; None for all others."""
    quant = checkpoint.quant
    if quant is not None:
        return None if quant.type == "int8" else f"{quant.type}, 4 bits a weight"
    file = getattr(checkpoint.files, "file", None)
    kinds = sorted({info.type for info in file.tensors.values() if info.type.removeprefix("I")[:2] in _FEW}) if file is not None else []
    return f"{', '.join(kinds)}, at most 4 bits a weight" if kinds else None


def _logits(model: Model, texts: Sequence[Tensor]) -> Tensor:
    """Of every token of every text, one below the other, float32 [tokens, vocab]."""
    return torch.cat([model(text).logits[0].float() for text in texts])


def _divergence(expected: Tensor, given: Tensor) -> float:
    """Mean KL(expected || given) in nats."""
    total = 0.0
    for one, other in zip(expected.split(64), given.split(64), strict=True):
        p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return max(0.0, total / len(expected))
