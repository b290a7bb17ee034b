"""A language model's head as the chunked losses use it: logits of a few tokens at a time, and the gradients of what was made of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.nn import Model
from weft.nn.packed import PackedWeight

LEAST_TOKENS = 256  # of a chunk: with fewer, adding up the head's gradient costs more than the logits save
TOGETHER = 32  # tokens, of which a CPU's products take multiples: see `_rounded_up`
CPU_LOGITS, CPU_COMPILED_LOGITS, GPU_LOGITS = 1 << 20, 1 << 22, 1 << 27  # 4 MB lies in a cache; compiled chunks cost compile time


class Head(NamedTuple):
    """The map from hidden states to logits: weight [V, D], bias [V] or None, and Gemma's soft cap or None."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


def head_of(model: Model) -> Head:
    """The head of a model; a tied one is its embedding. One in fewer bits is written out in the dtype of the products."""
    head = model.head
    weight = model.embed.weight if head.weight is None else head.weight
    if isinstance(weight, PackedWeight):
        device = model.device.type
        weight = weight.dequantise(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype)
    return Head(weight, head.bias, head.softcap)


def cast_head(head: Head, dtype: torch.dtype) -> Head:
    return Head(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.softcap)


def logits_of(hidden: Tensor, head: Head, wide: torch.dtype) -> Tensor:
    """Logits [C, V] in `wide` of hidden [C, D], both in the dtype of the products; under the soft cap where there is one."""
    logits = F.linear(_rounded_up(hidden), head.weight, head.bias)[: len(hidden)].to(wide)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _rounded_up(rows: Tensor) -> Tensor:
    """rows [C, W] and as many of zeros below them as make C a multiple of `TOGETHER`.

    Answers of all lengths have chunks of all sizes, and for each size that it meets oneDNN makes code and keeps it, up to a thousand: with
    LoRA on SmolLM2-135M 4 MB more were in use after every step, in small pieces between which large tensors fit no longer.
    """
    more = -len(rows) % TOGETHER
    if not more or rows.device.type != "cpu" or torch.compiler.is_compiling():
        return rows
    return F.pad(rows, (0, 0, 0, more))


def before_cap(dlogits: Tensor, logits: Tensor, head: Head) -> Tensor:
    """The gradient with respect to what `logits_of` capped, from that with respect to its result."""
    return dlogits if head.softcap is None else dlogits * (1 - (logits / head.softcap).square())


def tokens_at_once(device: str, vocab: int) -> int:
    """Tokens at a time, a multiple of `TOGETHER`: as many as keep the logits where they are quick to reach."""
    cpu = CPU_COMPILED_LOGITS if torch.compiler.is_compiling() else CPU_LOGITS
    return max(LEAST_TOKENS, (cpu if device == "cpu" else GPU_LOGITS) // vocab // TOGETHER * TOGETHER)


class Gradients:
    """Gradients of the summed loss, filled chunk by chunk; None where nobody asks for one."""

    def __init__(self, hidden: Tensor, head: Head, wide: torch.dtype, wanted: tuple[bool, bool, bool]) -> None:
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=wide) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if head.bias is not None and wanted[2] else None

    def add(self, start: int, hidden: Tensor, weight: Tensor, dlogits: Tensor) -> None:
        """hidden [C, D] and weight [V, D] in the dtype of the products; dlogits [C, V] wide."""
        narrow = _rounded_up(dlogits.to(weight.dtype))
        if self.hidden is not None:
            self.hidden[start : start + len(hidden)] = (narrow @ weight)[: len(hidden)].to(self.hidden.dtype)
        if self.weight is not None:
            self.weight += narrow.t() @ _rounded_up(hidden)
        if self.bias is not None:
            self.bias += dlogits.sum(0)


def scaled(gradients: Sequence[Tensor | None], scale: Tensor, dtypes: tuple[torch.dtype, torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias, as `Gradients` holds them, times that of the sum; the last two in `dtypes`."""
    hidden, weight, bias = gradients
    return (
        None if hidden is None else hidden * scale.to(hidden.dtype),
        None if weight is None else (weight * scale).to(dtypes[0]),
        None if bias is None else (bias * scale).to(dtypes[1]),
    )
