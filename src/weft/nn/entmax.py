"""Alpha-entmax: a softmax that can give exactly zero (Blondel et al. 2019; Peters et al. 2019), and attention by it.

entmax(x, alpha) maximises p.x + H(p) over distributions p, with Tsallis' entropy of order alpha, which gives
p_i = [(alpha - 1) x_i - tau]_+ ^ (1 / (alpha - 1)) with the tau at which they sum to one. alpha -> 1 is softmax, 2 is sparsemax.

Shapes: B batch, T queries, K keys, H heads, G key-value heads, D channels a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Alpha = float | Tensor


def entmax_naive(x: Tensor, alpha: Alpha, mask: Tensor) -> Tensor:
    """The definition, its threshold found by halving an interval a hundred times; the twin that `entmax` is tested against.

    Arguments as in `entmax`. Written with powers, and differentiable nowhere.
    """
    scaled = (x * (alpha - 1)).masked_fill(~mask, -torch.inf)
    high = scaled.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(100):
        middle = (low + high) / 2
        too_much = (scaled - middle).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (scaled - low).clamp(min=0).pow(1 / (alpha - 1)).nan_to_num(0.0)


def entmax(x: Tensor, alpha: Alpha, mask: Tensor | None = None, at_most_two: bool = False) -> Tensor:
    """Distributions [..., K] over the last axis of scores x [..., K], in x's dtype (float32 or float64).

    alpha  above 1. The numbers 1.5 and 2 are exact, by sorting; any other number, and a tensor that broadcasts against x with a last axis
           of 1, by bisection. A tensor gets a gradient too.
    mask   bool, broadcasts against x: False gets exactly 0. A row of which nothing is left gives zeros.
    at_most_two  no entry of a tensor alpha is above 2, which saves half of the time. Beyond 2 weights near 0 are as uncertain as a root of
                 rounding errors.
    """
    if mask is not None:
        x = x.masked_fill(~mask, torch.finfo(x.dtype).min)  # not -inf: a row without any key must stay finite
    p: Tensor = _Entmax.apply(x, alpha, at_most_two or (not isinstance(alpha, Tensor) and alpha <= 2))
    return p if mask is None else p * mask  # of a row without any key, which is then uniform, nothing stays


class _Entmax(torch.autograd.Function):
    """The gradients are written out: they follow from p alone, however its threshold was found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Alpha, at_most_two: bool) -> Tensor:
        if isinstance(alpha, Tensor) or alpha not in (1.5, 2.0):
            p = _bisected(x, alpha, at_most_two)
        else:
            p = _sorted(x, alpha)
        ctx.alpha = None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(*((p, alpha) if isinstance(alpha, Tensor) else (p,)))
        return p

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """dp/dx = diag(s) - s s^T / sum(s) with s = p^(2 - alpha) on the support (Peters et al. 2019, proposition 2), and
        dp/dalpha = (p - q) / (alpha - 1)^2 + (h - q sum(h)) / (alpha - 1) with q = s / sum(s) and h = -p ln p (Correia et al. 2019,
        proposition 1)."""
        (p, *learned), gradient = ctx.saved_tensors, outer[0]  # unpacked once: checkpointing allows no more
        if ctx.alpha is not None:
            s = p.sqrt() if ctx.alpha == 1.5 else torch.where(p > 0, torch.where(p > 0, p, 1.0).pow(2 - ctx.alpha), 0.0)
            return s * _centred(gradient, s), None, None
        # s - p is computed by itself, as p - q is divided by what may be small.
        excess = learned[0].to(p.dtype) - 1
        log = torch.where(p > 0, p, 1.0).log()
        change = p * torch.expm1(-excess * log)
        s = p + change
        centred = _centred(gradient, s)
        if not ctx.needs_input_grad[1]:
            return s * centred, None, None
        # Every term in q falls away, as `centred` is orthogonal to it, but for the one that makes p - q exact.
        total = change.sum(-1, keepdim=True)
        slope = (p * total - change) / ((1 + total) * excess.square()) - p * log / excess
        return s * centred, (centred * slope).sum_to_size(excess.shape).to(learned[0].dtype), None


def _centred(gradient: Tensor, s: Tensor) -> Tensor:
    """The gradient less its mean under q = s / sum(s)."""
    return gradient - (s * gradient).sum(-1, keepdim=True) / s.sum(-1, keepdim=True)


def _sorted(x: Tensor, alpha: float) -> Tensor:
    """alpha 1.5 or 2 (Peters et al. 2019, algorithm 2; Martins and Astudillo 2016, algorithm 1): the threshold follows from how many of the
    largest scores are above it, and each number is tried at once."""
    z = (x - x.amax(-1, keepdim=True)) * (alpha - 1)
    z = z.clamp(min=-1.0)  # the threshold is at least -1: what lies below has no weight, and must not blur the sums
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = ordered.cumsum(-1) / count
    if alpha == 2.0:
        thresholds = mean - 1 / count
    else:
        spread = ordered.square().cumsum(-1) - count * mean.square()
        thresholds = mean - ((1 - spread).clamp(min=0) / count).sqrt()
    thresholds = thresholds.clamp(min=-1.0)
    size = (thresholds < ordered).sum(-1, keepdim=True)
    tau = thresholds.gather(-1, size - 1)
    # One step of Newton's method takes away what the long sums lost.
    above = (z - tau).clamp(min=0)
    if alpha == 2.0:
        return (z - (tau + (above.sum(-1, keepdim=True) - 1) / size).clamp(min=-1.0)).clamp(min=0)
    tau = tau + (above.square().sum(-1, keepdim=True) - 1) / (2 * above.sum(-1, keepdim=True))
    return (z - tau.clamp(min=-1.0)).clamp(min=0).square()


def _bisected(x: Tensor, alpha: Alpha, at_most_two: bool) -> Tensor:
    """Any alpha. With scores whose largest is 0, p = exp(log(1 + (alpha - 1)(x - tau)) / (alpha - 1)), which keeps its meaning as alpha
    nears 1; tau lies between 0 and the value at which K equal scores share alike, (1 - K^(1 - alpha)) / (alpha - 1).

    Up to 2 the sum of p is convex in tau: Newton's method from below never overshoots, and ends in a few steps what halving began.
    """
    excess = torch.as_tensor(alpha, dtype=x.dtype, device=x.device) - 1
    x = x - x.amax(-1, keepdim=True)
    low = torch.zeros_like(x[..., :1])
    width = -torch.expm1(-excess * math.log(x.shape[-1])) / excess
    halvings = 8 if at_most_two else 28 if x.dtype == torch.float32 else 56
    for _ in range(halvings):
        width = width / 2
        low = torch.where(_powers(x - low - width, excess)[1].sum(-1, keepdim=True) >= 1, low + width, low)
    for _ in range(6 if at_most_two else 0):
        base, p = _powers(x - low, excess)
        slope = torch.where(base > 0, p / base, 0.0).sum(-1, keepdim=True)
        low = low + (p.sum(-1, keepdim=True) - 1) / slope
    p = _powers(x - low, excess)[1]
    return p / p.sum(-1, keepdim=True)


def _powers(x: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """[1 + excess x]_+ and its power 1 / excess."""
    shifted = (excess * x).clamp(min=-1.0)
    return 1 + shifted, torch.exp(torch.log1p(shifted) / excess)


def attend_entmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, alpha: Alpha, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, D] over k and v [B, K, G, D] under a mask bool [B, T, K]: [B, T, H, D], and the weights [B, H, T, K].

    alpha  a number, or a tensor [H] with entries up to 2. Weights are float32 (float64 stays), and exactly 0 where the mask is False.
    """
    batch, length, heads, width = q.shape
    groups, share = k.shape[2], heads // k.shape[2]
    folded = q.view(batch, length, groups, share, width).permute(0, 2, 3, 1, 4).reshape(batch, groups, share * length, width)
    scores = torch.matmul(folded * scale, k.permute(0, 2, 3, 1)).view(batch, heads, length, -1)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    weights = entmax(scores, alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha, mask[:, None], isinstance(alpha, Tensor))
    used = (F.dropout(weights, dropout) if dropout else weights).to(v.dtype)
    mixed = torch.matmul(used.view(batch, groups, share * length, -1), v.transpose(1, 2))
    return mixed.view(batch, heads, length, width).transpose(1, 2), weights


def attend_entmax_naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, alpha: Alpha) -> Tensor:
    """The definition, head by head; the twin of `attend_entmax`. Returns [B, T, H, D]."""
    group = q.shape[2] // k.shape[2]
    outputs = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) * scale
        weights = entmax_naive(scores, alpha[head] if isinstance(alpha, Tensor) else alpha, mask)
        outputs.append(weights @ v[:, :, head // group])
    return torch.stack(outputs, 2)
