"""Log-probabilities of given tokens under a linear head, a number a token, without ever holding all logits.

`cross_entropy` sums its losses before anybody can weigh them; here what each token counts is only known afterwards (DPO, PPO, GRPO). So the
forward pass keeps a log-partition function a token, and the backward pass makes each chunk's logits once more: four matrix products.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.nn.precision import working_dtype
from weft.objectives.cross_entropy import probabilities
from weft.objectives.head import Gradients, Head, before_cap, cast_head, logits_of, tokens_at_once


class LogProbs(NamedTuple):
    """log_probs [N] in nats, which carry the gradient, and the entropies [N] of the distributions they are of, which carry none (None where
    not asked for); float32, or float64 where the hidden states are."""

    log_probs: Tensor
    entropy: Tensor | None = None


def naive_log_probs(hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0) -> LogProbs:
    """The definition, with all logits at once; the twin that `linear_log_probs` is tested against."""
    logits = F.linear(hidden, head.weight, head.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_probs = (logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return LogProbs(log_probs.gather(-1, targets[:, None])[:, 0], entropy)


def linear_log_probs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, entropy: bool = False, chunk: int | None = None
) -> LogProbs:
    """log softmax(head(hidden) / temperature) at `targets`.

    hidden [N, D]; targets [N] int64, in range also where nobody reads the result; chunk tokens at a time (None: as many as suit the
    device). Products run in autocast's dtype where it is on, sums over ids in float32 (float64 stays).
    """
    chunk = chunk or tokens_at_once(hidden.device.type, head.weight.shape[0])
    if torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad):
        values, entropies = _Chunked.apply(hidden, head.weight, head.bias, targets, head.softcap, temperature, entropy, chunk)
    else:
        values, entropies, _ = _sweep(hidden, head, targets, temperature, entropy, chunk)
    return LogProbs(values, entropies if entropy else None)


def token_log_probs(hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, entropy: bool = False) -> LogProbs:
    """The same for rows: hidden [R, T, D] and targets [R, T] (negative where there is none) to values [R, T]."""
    found = linear_log_probs(hidden.flatten(0, 1), head, targets.flatten().clamp(min=0), temperature, entropy)
    return LogProbs(found.log_probs.view(targets.shape), None if found.entropy is None else found.entropy.view(targets.shape))


def _sweep(hidden: Tensor, head: Head, targets: Tensor, temperature: float, entropy: bool, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies (empty where not asked for) and log-partition functions, [N] each."""
    narrow = working_dtype(hidden)
    wide = torch.float64 if narrow == torch.float64 else torch.float32
    none = hidden.new_empty(0, dtype=wide)  # there may be no token at all
    values, entropies, partitions = [none], [none], [none]
    with torch.autocast(hidden.device.type, enabled=False):
        cast = cast_head(head, narrow)
        for start in range(0, hidden.shape[0], chunk):
            h, target = hidden[start : start + chunk].to(narrow), targets[start : start + chunk, None]
            logits = logits_of(h, cast, wide) / temperature
            shares, partition = probabilities(logits)
            values.append(logits.gather(-1, target)[:, 0] - partition)
            partitions.append(partition)
            if entropy:
                entropies.append(partition - (shares * logits).sum(-1))
    return torch.cat(values), torch.cat(entropies), torch.cat(partitions)


class _Chunked(torch.autograd.Function):
    """The sweep, and its gradient by a second one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        temperature: float,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        values, entropies, partition = _sweep(hidden, Head(weight, bias, softcap), targets, temperature, entropy, chunk)
        ctx.save_for_backward(hidden, weight, bias, targets, partition)
        ctx.softcap, ctx.temperature, ctx.chunk, ctx.narrow = softcap, temperature, chunk, working_dtype(hidden)
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, partition = ctx.saved_tensors
        wide = partition.dtype
        head = Head(weight, bias, ctx.softcap)
        gradients = Gradients(hidden, head, wide, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            cast = cast_head(head, ctx.narrow)
            for start in range(0, hidden.shape[0], ctx.chunk):
                place = slice(start, start + ctx.chunk)
                h, target = hidden[place].to(ctx.narrow), targets[place, None]
                scale = (outer[0][place] / ctx.temperature)[:, None]
                logits = logits_of(h, cast, wide)
                shares = (logits / ctx.temperature - partition[place, None]).exp()
                dlogits = (shares * -scale).scatter_add(-1, target, scale)
                gradients.add(start, h, cast.weight, before_cap(dlogits, logits, cast))
        return (
            gradients.hidden,
            None if gradients.weight is None else gradients.weight.to(weight.dtype),
            None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype),
            *(None,) * 5,
        )
