"""Causal attention in blocks of queries: the parallel form on a CPU, where torch's fused kernel is three times slower.

Block i holds queries [iC, iC + C) and looks at keys [0, iC + C) alone: almost half of all products, those above the diagonal, are
left out. Each block is a batched product a key-value head, with the queries of its group side by side, around a softmax that a
compiler fuses into two passes. The mask is an addend that all layers share, so packed documents cost the same as whole rows.

Shapes: B batch, T tokens, H heads, G key-value heads, S = H / G heads a group, D channels a head (values may have
another number E), C queries a block.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)  # exp(x) as exp2(x log2 e): torch's exp on a CPU is 3 times slower, and 20 times where it underflows
BLOCK = 128  # measured at 512 tokens: 64 is as fast but twice the code to compile, 256 a third slower
MAX_BLOCKS = 8
HIDDEN = -1e30  # added to the score of a key that may not be seen; finite, so that no difference of two is NaN
MAX_LENGTH = 2048  # the weights of every block are kept for the backward pass; beyond this they would outweigh all other activations


def attend_blocked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of q [B, T, H, D] over k [B, T, G, D] and v [B, T, G, E], in v's dtype; returns [B, T, H, E].

    bias    [1 or B, T, T] added to the scores, 0 or HIDDEN as `causal_bias` gives them: it forbids every later key, and leaves every
            query its own.
    window  the window that bias was made with: keys further back are skipped.
    Softmax runs in float32 (float64 stays); the gradient is written out, so that only narrow weights are kept for it.
    """
    apply: Callable[..., Tensor] = _BlockedAttention.apply
    return apply(q.to(v.dtype), k.to(v.dtype), v, bias, scale, window)


@torch.library.custom_op("weft::causal_bias", mutates_args=())
def causal_bias(positions: Tensor, window: int | None = None) -> Tensor:
    """0 where query i may look at key j of the same row, a large negative number elsewhere: float32 [B, T, T] for positions [B, T].

    It may look from the first token of its document, the one `positions[i]` before it, or of its window, up to itself. An operator of
    its own, because a compiler would otherwise work it out anew in every layer and block: a third of the time of the softmax.
    """
    index = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
    first = index - positions.int()
    if window is not None:
        first = torch.maximum(first, index - window + 1)
    hidden = (index < first[:, :, None]) | (index > index[:, None])
    return torch.zeros(hidden.shape, dtype=torch.float32, device=index.device).masked_fill_(hidden, HIDDEN)


@causal_bias.register_fake
def _(positions: Tensor, window: int | None = None) -> Tensor:
    return positions.new_empty((*positions.shape, positions.shape[1]), dtype=torch.float32)


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """For each block its first key, its first query, and the end of both."""
    size = max(BLOCK, -(-length // MAX_BLOCKS))
    for start in range(0, length, size):
        yield (0 if window is None else max(0, start - window + 1)), start, min(start + size, length)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _BlockedAttention(torch.autograd.Function):
    """With P = exp(S - max S) and n = 1 / row sum of P, the output is n (P V); n is applied to the narrow tensors only.

    For an incoming gradient g and its normalised form h = n g: dV = P^T h, dS = P (h V^T - sum(h out)), dQ = dS K, dK = dS^T Q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, window: int | None) -> Tensor:
        batch, length, heads, width = q.shape
        groups = k.shape[2]
        share, pairs = heads // groups, batch * groups
        queries = _by_group(q * scale, groups)
        keys = k.permute(0, 2, 3, 1).reshape(pairs, width, length)
        values = v.transpose(1, 2).reshape(pairs, length, -1)
        mixed, weights, norms = [], [], []
        for low, start, end in _blocks(length, window):
            rows = end - start
            block = queries[:, :, :, start:end].reshape(pairs, share * rows, width)
            scores = torch.bmm(block, keys[:, :, low:end]).view(batch, heads, rows, end - low)
            scores = torch.add(bias[:, None, start:end, low:end], _wide(scores), alpha=LOG2_E)
            p = scores.sub_(scores.amax(-1, keepdim=True)).exp2_().to(v.dtype)
            norms.append(_wide(p).sum(-1, keepdim=True).view(batch, groups, share, rows, 1))
            weights.append(p.view(pairs, share * rows, end - low))
            mixed.append(torch.bmm(weights[-1], values[:, low:end]).view(batch, groups, share, rows, -1))
        inverse = torch.cat(norms, 3).reciprocal()
        out = (torch.cat(mixed, 3) * inverse).to(v.dtype)
        ctx.save_for_backward(queries, keys, values, out, inverse, *weights)
        ctx.scale, ctx.window = scale, window
        return _by_token(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out, inverse, *weights = ctx.saved_tensors
        batch, groups, share, length, width = queries.shape
        pairs = batch * groups
        incoming = _wide(_by_group(grad, groups)) * inverse
        dots = (incoming * _wide(out)).sum(-1, keepdim=True)
        incoming = incoming.to(out.dtype)
        keys, values = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
        spans, grad_q, grad_k, grad_v = list(_blocks(length, ctx.window)), [], [], []
        for p, (low, start, end) in zip(weights, spans, strict=True):
            rows = share * (end - start)
            h = incoming[:, :, :, start:end].reshape(pairs, rows, -1)
            dot = dots[:, :, :, start:end].reshape(pairs, rows, 1)
            ds = _wide(torch.bmm(h, values[:, :, low:end])).sub_(dot).mul_(_wide(p)).to(p.dtype)
            grad_q.append(torch.bmm(ds, keys[:, low:end]).view(batch, groups, share, end - start, width))
            grad_k.append(torch.bmm(ds.transpose(1, 2), queries[:, :, :, start:end].reshape(pairs, rows, width)))
            grad_v.append(torch.bmm(p.transpose(1, 2), h))
        dq = _by_token(torch.cat(grad_q, 3) * ctx.scale)
        dk, dv = (_sum_spans(parts, spans).view(batch, groups, length, -1).transpose(1, 2) for parts in (grad_k, grad_v))
        return dq, dk, dv, None, None, None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, T, H, D] -> [B, G, S, T, D], contiguous."""
    batch, length, _, width = x.shape
    return x.reshape(batch, length, groups, -1, width).permute(0, 2, 3, 1, 4).contiguous()


def _by_token(x: Tensor) -> Tensor:
    """[B, G, S, T, D] -> [B, T, H, D]."""
    batch, groups, share, length, width = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(batch, length, groups * share, width)


def _sum_spans(parts: list[Tensor], spans: list[tuple[int, int, int]]) -> Tensor:
    """Sum gradients [N, end - low, D] of overlapping spans of keys into [N, T, D], in float32, one stretch of keys at a time."""
    edges = sorted({edge for low, _, end in spans for edge in (low, end)})
    stretches = []
    for first, last in pairwise(edges):
        covering = [part[:, first - low : last - low] for part, (low, _, end) in zip(parts, spans, strict=True) if low <= first < end]
        total = _wide(covering[0])
        for part in covering[1:]:
            total = total + part
        stretches.append(total.to(parts[0].dtype))
    return torch.cat(stretches, 1)
