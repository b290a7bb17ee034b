"""Cross-entropy of a linear head without ever holding all logits.

Logits of N tokens over V ids in float32 are the largest tensor of a small model's training step. Here they live for one chunk of
tokens at a time, and the chunk's gradients are taken while they are there: three matrix products in all, as many as with all logits
at once, and memory O(chunk * V) (Wijmans et al. 2024 and Hsu et al. 2024 do the same in kernels).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.nn.precision import working_dtype
from weft.objectives.head import Gradients, Head, before_cap, cast_head, logits_of, scaled, tokens_at_once


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
    weight, bias, softcap = cast_head(head, narrow)
    loss, nll, _ = _frozen(hidden.to(narrow), weight, bias, targets, mask, softcap or 0.0, smoothing.label, smoothing.z, chunk or 0)
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


def _sweep(
    hidden: Tensor, head: Head, targets: Tensor, mask: Tensor, smoothing: Smoothing, chunk: int, gradients: Gradients | None
) -> Sums:
    """Both sums, one chunk of tokens after another, and the gradients of the first one."""
    device = hidden.device.type
    narrow = working_dtype(hidden)
    wide = torch.float64 if narrow == torch.float64 else torch.float32
    with torch.autocast(device, enabled=False):
        cast = cast_head(head, narrow)
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            h, target = hidden[start : start + chunk].to(narrow), targets[start : start + chunk, None]
            kept = mask[start : start + chunk].to(wide)
            logits = logits_of(h, cast, wide)
            shares, log_partition = probabilities(logits)
            nll = log_partition - logits.gather(-1, target)[:, 0]
            losses = (1 - smoothing.label) * nll + smoothing.z * log_partition.square()
            if smoothing.label:
                losses = losses + smoothing.label * (log_partition - logits.mean(-1))
            sums = sums + torch.stack([(losses * kept).sum(), (nll * kept).sum()])
            if gradients is not None:
                dlogits = _dlogits(shares, kept * (1 + 2 * smoothing.z * log_partition), kept, target, smoothing.label)
                gradients.add(start, h, cast.weight, before_cap(dlogits, logits, cast))
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
        return *scaled(ctx.saved_tensors, outer[0], ctx.dtypes), *(None,) * 5
