"""How far apart two language models' next-token distributions are, without ever holding all logits of either.

As in `cross_entropy`, logits of both live for one chunk of tokens, and the chunk's gradients are taken while they are there.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from weft.nn.precision import working_dtype
from weft.objectives.head import Gradients, Head, before_cap, cast_head, logits_of, scaled, tokens_at_once

Kind = Literal["forward", "reverse", "jsd"]


class Divergence(NamedTuple):
    """What is measured between a teacher's distribution p and a student's q, both softmax(logits / temperature), in nats.

    forward  KL(p || q): the student covers what the teacher says (Hinton et al. 2015).
    reverse  KL(q || p): the student says only what the teacher might.
    jsd      b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q: between the two (Agarwal et al. 2024, equation 1).
    """

    kind: Kind = "forward"
    temperature: float = 1.0
    mixture: float = 0.5


class Side(NamedTuple):
    """One model's hidden states [N, D] and head; widths and head biases may differ between the two, the number of ids may not."""

    hidden: Tensor
    head: Head


def naive_divergence(student: Side, teacher: Side, mask: Tensor, divergence: Divergence = Divergence()) -> Tensor:
    """The definition, with all logits at once; the twin that `linear_divergence` is tested against."""
    wide = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
    q, p = (_log_shares(logits_of(side.hidden, side.head, wide), divergence) for side in (student, teacher))
    return (_each(p.detach(), q, divergence) * mask).sum()


def linear_divergence(
    student: Side, teacher: Side, mask: Tensor, divergence: Divergence = Divergence(), chunk: int | None = None
) -> Tensor:
    """Sum over tokens of the divergence, a scalar; gradients go to the student alone.

    mask [N], bool or weights; chunk tokens at a time (None: as many as suit the device). Products run in autocast's dtype where it is on,
    sums over ids and tokens in float32 (float64 stays).
    """
    hidden, head = student
    chunk = chunk or tokens_at_once(hidden.device.type, head.weight.shape[0])
    if torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad):
        loss: Tensor = _Chunked.apply(hidden, head.weight, head.bias, head.softcap, teacher, mask, divergence, chunk)
        return loss
    return _sweep(student, teacher, mask, divergence, chunk, None)


def _log_shares(logits: Tensor, divergence: Divergence) -> Tensor:
    return (logits / divergence.temperature).log_softmax(-1)


def _each(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    """The divergence of each token, [C], from log-probabilities [C, V]."""
    if divergence.kind == "forward":
        return (p.exp() * (p - q)).sum(-1)
    if divergence.kind == "reverse":
        return (q.exp() * (q - p)).sum(-1)
    b, m = divergence.mixture, _mixed(p, q, divergence.mixture)
    return (b * p.exp() * (p - m) + (1 - b) * q.exp() * (q - m)).sum(-1)


def _mixed(p: Tensor, q: Tensor, mixture: float) -> Tensor:
    """log(b exp p + (1 - b) exp q)."""
    p, q = p + torch.log(p.new_tensor(mixture)), q + torch.log1p(-q.new_tensor(mixture))
    return torch.logaddexp(p, q)


def _slope(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    """Gradient [C, V] of each token's divergence with respect to the student's logits over the temperature.

    For reverse KL and JSD the derivative with respect to q(i) is g(i) = log q - log p, or (1 - b) (log q - log m), up to a constant; a
    softmax makes q (g - sum q g) of it.
    """
    shares = q.exp()
    if divergence.kind == "forward":
        return shares - p.exp()
    b = divergence.mixture
    g = q - p if divergence.kind == "reverse" else (1 - b) * (q - _mixed(p, q, b))
    return shares * (g - (shares * g).sum(-1, keepdim=True))


def _sweep(student: Side, teacher: Side, mask: Tensor, divergence: Divergence, chunk: int, gradients: Gradients | None) -> Tensor:
    """The sum, one chunk of tokens after another, and its gradients."""
    hidden, head = student
    device = hidden.device.type
    narrow = working_dtype(hidden)
    wide = torch.float64 if narrow == torch.float64 else torch.float32
    with torch.autocast(device, enabled=False):
        ours, theirs = (cast_head(side.head, narrow) for side in (student, teacher))
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            place = slice(start, start + chunk)
            logits = logits_of(hidden[place].to(narrow), ours, wide)
            q = _log_shares(logits, divergence)
            p = _log_shares(logits_of(teacher.hidden[place].to(narrow), theirs, wide), divergence)
            kept = mask[place].to(wide)
            total = total + (_each(p, q, divergence) * kept).sum()
            if gradients is not None:
                dlogits = _slope(p, q, divergence) * (kept / divergence.temperature)[:, None]
                gradients.add(start, hidden[place].to(narrow), ours.weight, before_cap(dlogits, logits, head))
    return total


class _Chunked(torch.autograd.Function):
    """The sweep as one differentiable step: the forward pass already holds what the backward pass hands out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        teacher: Side,
        mask: Tensor,
        divergence: Divergence,
        chunk: int,
    ) -> Tensor:
        head = Head(weight, bias, softcap)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        gradients = Gradients(hidden, head, wide, ctx.needs_input_grad[:3])
        loss = _sweep(Side(hidden, head), teacher, mask, divergence, chunk, gradients)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled(ctx.saved_tensors, outer[0], ctx.dtypes), *(None,) * 5
