"""Cross-entropy of a linear head without ever holding all logits.

Logits of N tokens over V ids in float32 are the largest tensor of a small model's training step. Here they live for one chunk of
tokens at a time, and the chunk's gradients are taken while they are there: three matrix products in all, as many as with all logits
at once, and memory O(chunk * V) (Wijmans et al. 2024 and Hsu et al. 2024 do the same in kernels).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.nn import Model
from weft.nn.packed import PackedWeight
from weft.nn.precision import working_dtype

LEAST_TOKENS = 256  # of a chunk: with fewer, adding up the head's gradient costs more than the logits save
CPU_LOGITS, CPU_COMPILED_LOGITS, GPU_LOGITS = 1 << 20, 1 << 22, 1 << 27  # 4 MB lies in a cache; compiled chunks cost compile time


class Head(NamedTuple):
    """The map from hidden states to logits: weight [V, D], bias [V] or None, and Gemma's soft cap or None."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class Smoothing(NamedTuple):
    """What is added to the plain loss.

    label   share of the target spread evenly over all ids (Szegedy et al. 2016, section 7).
    z       factor of the squared log-partition function (PaLM, Chowdhery et al. 2022, section 5).
    """

    label: float = 0.0
    z: float = 0.0


class Sums(NamedTuple):
    """Sums over tokens, scalars in float32 or wider: the loss, which carries the gradient, and the plain negative log-likelihood."""

    loss: Tensor
    nll: Tensor


def head_of(model: Model) -> Head:
    """The head of a model; a tied one is its embedding. One in fewer bits is written out in the dtype of the products."""
    head = model.head
    weight = model.embed.weight if head.weight is None else head.weight
    if isinstance(weight, PackedWeight):
        device = model.device.type
        weight = weight.dequantise(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype)
    return Head(weight, head.bias, head.softcap)


def naive_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, mask: Tensor, smoothing: Smoothing = Smoothing()) -> Sums:
    """The definition, with all logits at once; the twin that `linear_cross_entropy` is tested against."""
    logits = F.linear(hidden, head.weight, head.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_partition = logits.logsumexp(-1)
    nll = log_partition - logits.gather(-1, targets[:, None])[:, 0]
    uniform = log_partition - logits.mean(-1)
    losses = (1 - smoothing.label) * nll + smoothing.label * uniform + smoothing.z * log_partition.square()
    return Sums((losses * mask).sum(), (nll.detach() * mask).sum())


def linear_cross_entropy(
    hidden: Tensor, head: Head, targets: Tensor, mask: Tensor, smoothing: Smoothing = Smoothing(), chunk: int | None = None
) -> Sums:
    """Sums over tokens of the cross-entropy of `softmax(head(hidden))` against `targets`.

    hidden [N, D]; targets [N] int64; mask [N], bool or weights, zero where a token does not count (its target may be anything in
    range); chunk tokens at a time (None: as many as suit the device). Products run in autocast's dtype where it is on, sums over ids
    and tokens in float32 (float64 stays).
    """
    frozen = not head.weight.requires_grad and (head.bias is None or not head.bias.requires_grad)
    if frozen and torch.compiler.is_compiling() and hidden.device.type == "cpu":
        return _frozen_cross_entropy(hidden, head, targets, mask, smoothing, chunk)
    chunk = chunk or tokens_at_once(hidden.device.type, head.weight.shape[0])
    hidden, targets, mask = _scored(hidden, targets, mask)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad):
        loss, nll = _Chunked.apply(hidden, head.weight, head.bias, targets, mask, head.softcap, smoothing, chunk)
        return Sums(loss, nll)
    return _sweep(hidden, head, targets, mask, smoothing, chunk, None)


def _scored(hidden: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that count: of a prompt and of padding nobody needs logits. On a CPU and eagerly alone, for their number is data: a
    compiler wants to know shapes, and an accelerator would have to wait for it."""
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return hidden, targets, mask
    index = _counted(mask)
    if len(index) == len(mask):
        return hidden, targets, mask
    return hidden.index_select(0, index), targets[index], mask[index]


def _counted(mask: Tensor) -> Tensor:
    """Where a mask [N] is not zero; where it is zero everywhere the first place, as a loss of zero has a gradient too."""
    index = mask.nonzero()[:, 0]
    return index if len(index) else torch.zeros(1, dtype=torch.int64, device=mask.device)


def _frozen_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, mask: Tensor, smoothing: Smoothing, chunk: int | None) -> Sums:
    """The same for a head that is not trained, as one operation to a compiler: tokens that do not count are then left out there too."""
    narrow = working_dtype(hidden)
    bias = None if head.bias is None else head.bias.to(narrow)
    softcap = 0.0 if head.softcap is None else head.softcap
    weight = head.weight.to(narrow)
    loss, nll, _ = _frozen(hidden.to(narrow), weight, bias, targets, mask, softcap, smoothing.label, smoothing.z, chunk or 0)
    return Sums(loss, nll)


@torch.library.custom_op("weft::frozen_cross_entropy", mutates_args=())
def _frozen(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor, softcap: float, label: float, z: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the plain negative log-likelihood, and the loss's gradient with respect to hidden [N, D]."""
    index = _counted(mask)
    scored, head, kept = hidden[index], Head(weight, bias, softcap or None), mask[index]
    gradients = Gradients(scored, head, torch.float64 if hidden.dtype == torch.float64 else torch.float32, (True, False, False))
    chunk = chunk or tokens_at_once(hidden.device.type, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        sums = _sweep(scored, head, targets[index], kept, Smoothing(label, z), chunk, gradients)
    assert gradients.hidden is not None
    return sums.loss.clone(), sums.nll.clone(), torch.zeros_like(hidden).index_copy_(0, index, gradients.hidden)


@_frozen.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor, softcap: float, label: float, z: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((), dtype=wide), hidden.new_empty((), dtype=wide), torch.empty_like(hidden)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2])


def _hand_out(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return gradient * outer[0].to(gradient.dtype), *(None,) * 8


_frozen.register_autograd(_hand_out, setup_context=_keep)


def tokens_at_once(device: str, vocab: int) -> int:
    """Tokens at a time: as many as keep the logits where they are quick to reach."""
    cpu = CPU_COMPILED_LOGITS if torch.compiler.is_compiling() else CPU_LOGITS
    return max(LEAST_TOKENS, (cpu if device == "cpu" else GPU_LOGITS) // vocab)


class Gradients:
    """Gradients of the summed loss, filled chunk by chunk; None where nobody asks for one."""

    def __init__(self, hidden: Tensor, head: Head, wide: torch.dtype, wanted: tuple[bool, bool, bool]) -> None:
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=wide) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if head.bias is not None and wanted[2] else None

    def add(self, start: int, hidden: Tensor, weight: Tensor, dlogits: Tensor) -> None:
        """hidden [C, D] and weight [V, D] in the dtype of the products; dlogits [C, V] wide."""
        narrow = dlogits.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[start : start + hidden.shape[0]] = (narrow @ weight).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight += narrow.t() @ hidden
        if self.bias is not None:
            self.bias += dlogits.sum(0)


def _sweep(
    hidden: Tensor, head: Head, targets: Tensor, mask: Tensor, smoothing: Smoothing, chunk: int, gradients: Gradients | None
) -> Sums:
    """Both sums, one chunk of tokens after another, and the gradients of the first one."""
    device = hidden.device.type
    narrow = working_dtype(hidden)
    wide = torch.float64 if narrow == torch.float64 else torch.float32
    with torch.autocast(device, enabled=False):
        weight, bias = head.weight.to(narrow), None if head.bias is None else head.bias.to(narrow)
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            h, target = hidden[start : start + chunk].to(narrow), targets[start : start + chunk, None]
            kept = mask[start : start + chunk].to(wide)
            logits = F.linear(h, weight, bias).to(wide)
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            shares, log_partition = probabilities(logits)
            nll = log_partition - logits.gather(-1, target)[:, 0]
            losses = (1 - smoothing.label) * nll + smoothing.z * log_partition.square()
            if smoothing.label:
                losses = losses + smoothing.label * (log_partition - logits.mean(-1))
            sums = sums + torch.stack([(losses * kept).sum(), (nll * kept).sum()])
            if gradients is not None:
                dlogits = _dlogits(shares, kept * (1 + 2 * smoothing.z * log_partition), kept, target, smoothing.label)
                if head.softcap is not None:
                    dlogits = dlogits * (1 - (logits / head.softcap).square())
                gradients.add(start, h, weight, dlogits)
    return Sums(sums[0], sums[1])


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [C, V] and the log-partition function [C] of logits [C, V].

    The partition function is read off the most probable id, whose share is at least 1 / V: one fused kernel and a look at the largest of
    each, where `logsumexp` would write and read all of them twice more. The largest logit has the largest share, so that nobody need know
    which id it is: on a CPU that takes seven times as long to find.
    """
    shares = logits.softmax(-1)
    return shares, logits.amax(-1) - shares.amax(-1).log()


def _dlogits(shares: Tensor, grown: Tensor, kept: Tensor, target: Tensor, label: float) -> Tensor:
    """Gradient [C, V] of the masked loss with respect to logits, made out of the probabilities [C, V], which it overwrites.

    grown [C] is the mask times 1 + 2 z log-partition: the z-loss only makes probabilities heavier.
    """
    gradient = shares.mul_(grown[:, None])
    if label:
        gradient.sub_((kept * (label / shares.shape[-1]))[:, None])
    hit = (kept * (label - 1))[:, None]
    if torch.compiler.is_compiling():  # fuses with the lines above, which a scatter would not
        return gradient + torch.where(torch.arange(shares.shape[-1], device=shares.device) == target, hit, 0.0)
    return gradient.scatter_add_(-1, target, hit)


class _Chunked(torch.autograd.Function):
    """The sweep as one differentiable step: the forward pass already holds what the backward pass hands out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        mask: Tensor,
        softcap: float | None,
        smoothing: Smoothing,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = Head(weight, bias, softcap)
        gradients = Gradients(hidden, head, wide, ctx.needs_input_grad[:3])
        loss, nll = _sweep(hidden, head, targets, mask, smoothing, chunk, gradients)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        scale = outer[0]
        return (
            None if hidden is None else hidden * scale.to(hidden.dtype),
            None if weight is None else (weight * scale).to(ctx.dtypes[0]),
            None if bias is None else (bias * scale).to(ctx.dtypes[1]),
            *(None,) * 5,
        )
