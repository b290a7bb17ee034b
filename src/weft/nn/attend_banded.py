"""Attention to a band of keys in time and memory that grow linearly with the text: windows, dilated windows, pinned first positions.

The strided pattern is two bands, one of which has no end: its time is that of dense attention over its stride.

Queries are taken in blocks of C; a block of a window W looks at C + W - 1 keys. Weights are not kept for the backward pass but worked out
again from the logarithm of each row's sum of exponentials (Dao et al. 2022, algorithms 1 and 4): what is kept are q, k, v, the output and
that logarithm. A dilated window is a plain one within each residue class of positions. Pinned positions are a second, narrow attention,
joined to the first by the two logarithms.

Shapes: B batch, T tokens, H heads, G key-value heads, S = H / G heads a group, D channels of a head's queries and keys, E of its values,
N rows of a batch and key-value heads, C queries a block, K keys a block looks at.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from weft.spec import Band, Strided

LOG2_E = math.log2(math.e)  # exp(x) as exp2(x log2 e), as in `attend_blocked`
BLOCK = 128
NOTHING = -1e30  # the score of a hidden key, and the logarithm of a row that sees none: finite, so that no difference is NaN


def attend_banded(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, band: Band, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B, T, H, D] to the keys of a band among k [B, T, G, D] and v [B, T, G, E], of the query's own document.

    positions  [B, T] int64 within documents that are packed one after another, each from position 0; None where every row is one document.
    Returns [B, T, H, E] in v's dtype and the logarithm of each row's sum of exponentials, float32 (float64 stays) [B, T, H]. Softmax runs
    in that dtype.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    index = torch.arange(q.shape[1], device=q.device)[None]
    document = torch.zeros_like(index) if positions is None else index - positions
    near = _dilated(q, k, v, document + band.pinned, band, scale, softcap)
    if not band.pinned:
        return near
    seen = torch.arange(min(band.pinned, q.shape[1]), device=q.device)
    where = None if positions is None else document[:, :, None] + seen
    hidden = seen > (index if positions is None else positions)[:, :, None]
    return _joined(near, _attend_pinned(q, k, v, where, hidden, scale, softcap))


def attend_strided(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, pattern: Strided, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same for a strided pattern's far part, with or without its local part."""
    length, stride = q.shape[1], pattern.stride
    far = attend_banded(q, k, v, positions, Band(-(-length // stride), stride), scale, softcap)
    if pattern.part == "far":
        return far
    # The local part without what the far part has of it, the query itself and the token one stride back: keys 1 ... stride - 1 tokens
    # back, each moved one place on.
    index = torch.arange(1, length + 1, device=q.device)[None]
    first = torch.ones_like(index) if positions is None else index - positions
    k, v = (torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) for x in (k, v))
    local: tuple[Tensor, Tensor] = torch.ops.weft.attend_window(q.to(v.dtype), k.to(v.dtype), v, first, stride - 1, scale, softcap or 0.0)
    return _joined(far, local)


def with_sink(mixed: Tensor, logs: Tensor, sink: Tensor) -> Tensor:
    """Attention [B, T, H, E] and its logarithms [B, T, H] with one more logit a head, `sink` [H], in the denominator (gpt-oss)."""
    return (mixed * torch.sigmoid(logs - sink.to(logs.dtype))[..., None]).to(mixed.dtype)


def _dilated(q: Tensor, k: Tensor, v: Tensor, first: Tensor, band: Band, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The band without its pinned positions; the first key that a query may see in its document is `first` [1 or B, T]."""
    steps, batch, length = band.dilation, q.shape[0], q.shape[1]
    if steps == 1:
        return torch.ops.weft.attend_window(q, k, v, first, band.width, scale, softcap or 0.0)
    rest = -length % steps
    residue = torch.arange(steps, device=q.device)
    # Entry a of class r is token a * steps + r, so the first one at or after token f is entry ceil((f - r) / steps).
    classes = -((residue[:, None] - _classes(_padded(first, rest), steps)) // steps)
    parts = [_classes(_padded(x, rest), steps).flatten(0, 1) for x in (q, k, v)]
    mixed, logs = torch.ops.weft.attend_window(
        *parts, classes.expand(batch, -1, -1).flatten(0, 1).contiguous(), band.width, scale, softcap or 0.0
    )
    return _merged(mixed, batch)[:, :length], _merged(logs, batch)[:, :length]


def _padded(x: Tensor, rest: int) -> Tensor:
    """x [B, T, *] with `rest` zeros behind each row."""
    return x if rest == 0 else torch.cat([x, x.new_zeros(x.shape[0], rest, *x.shape[2:])], 1)


def _classes(x: Tensor, steps: int) -> Tensor:
    """[B, T, *] -> [B, steps, T / steps, *]: tokens by residue class."""
    return x.unflatten(1, (-1, steps)).transpose(1, 2)


def _merged(x: Tensor, batch: int) -> Tensor:
    """[B * steps, T / steps, *] -> [B, T, *]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)


def _attend_pinned(
    q: Tensor, k: Tensor, v: Tensor, where: Tensor | None, hidden: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention to the first P positions alone, at tokens `where` [B, T, P] of a query's row, or None for the first P of every row.

    hidden  bool [1 or B, T, P]: those that come after the query.
    """
    batch, length, heads, _ = q.shape
    groups, pinned = k.shape[2], hidden.shape[2]
    grouped = q.reshape(batch, length, groups, heads // groups, -1) * scale
    if where is None:
        keys, values, each = k[:, :pinned], v[:, :pinned], "bpgd"
    else:
        rows, where = torch.arange(batch, device=q.device)[:, None, None], where.clamp(max=length - 1)
        keys, values, each = k[rows, where], v[rows, where], "btpgd"
    scores = _wide(torch.einsum(f"btgsd,{each}->btgsp", grouped, keys))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden[:, :, None, None], NOTHING)
    logs = scores.logsumexp(-1)
    weights = (scores - logs[..., None]).exp().to(v.dtype)
    mixed = torch.einsum(f"btgsp,{each}->btgsd", weights, values)
    return mixed.reshape(batch, length, heads, -1), logs.view(batch, length, heads)


def _joined(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from attention to each."""
    share = torch.sigmoid(a[1] - b[1])[..., None]
    return (share * a[0] + (1 - share) * b[0]).to(a[0].dtype), torch.logaddexp(a[1], b[1])


# One operator, and not a function that a compiler would unroll: a text of 16,000 tokens has 128 blocks.


@torch.library.custom_op("weft::attend_window", mutates_args=())
def attend_window(q: Tensor, k: Tensor, v: Tensor, first: Tensor, window: int, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Attention of query i to keys max(i - window + 1, first[i]) ... i; shapes as in `attend_banded`, first [1 or B, T].

    softcap  0 is none. A query without any key gives zeros, and NOTHING for its logarithm.
    """
    batch, length, heads, _ = q.shape
    groups, keys, values = k.shape[2], _by_row(k), _by_row(v)
    mixed = v.new_empty(batch, length, heads, v.shape[-1])
    logs = q.new_empty(batch, length, heads, dtype=_wide(q[:0]).dtype)
    for low, start, end in spans(length, window):
        scores, hidden = _scores(
            _by_group(q[:, start:end], groups), keys[:, low:end], _hidden(first, low, start, end, window), scale, softcap
        )
        scores.masked_fill_(hidden, NOTHING)
        most = scores.amax(-1, keepdim=True).clamp_(min=NOTHING / 2)  # so that a row without keys has exponentials of zero
        weights = scores.sub_(most).exp2_()
        sums = weights.sum(-1, keepdim=True)
        part = torch.bmm(weights.to(v.dtype).view(batch * groups, -1, end - low), values[:, low:end]).view(*sums.shape[:4], -1)
        mixed[:, start:end] = _by_token(part / sums.clamp(min=1e-30))
        logs[:, start:end] = _by_token(torch.where(sums > 0, (most + sums.log2()) / LOG2_E, NOTHING))[..., 0]
    return mixed, logs


@attend_window.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor, window: int, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.custom_op("weft::attend_window_backward", mutates_args=())
def attend_window_backward(
    saved: list[Tensor], incoming: list[Tensor], window: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. saved are q, k, v, first, output and logarithms, incoming the gradients of the last two.

    With P the weights, g and h the incoming gradients: dV = P^T g, dS = P (g V^T - sum(g out) + h), dQ = dS K, dK = dS^T Q.
    """
    q, k, v, first, out, logs = saved
    batch, length, groups, _ = k.shape
    rows, keys, values = batch * groups, _by_row(k), _by_row(v)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = torch.zeros_like(_wide(keys)), torch.zeros_like(_wide(values))
    for low, start, end in spans(length, window):
        here = slice(start, end)
        queries, g = _by_group(q[:, here], groups), _by_group(incoming[0][:, here].to(v.dtype), groups).view(rows, -1, v.shape[-1])
        offset = (incoming[1][:, here] - (_wide(incoming[0][:, here]) * _wide(out[:, here])).sum(-1))[..., None]
        raw, hidden = _scores(queries, keys[:, low:end], _hidden(first, low, start, end, window), scale, softcap)
        base = _by_group(logs[:, here, :, None], groups).clamp(min=NOTHING / 2)
        weights = (raw - base * LOG2_E).exp2_().masked_fill_(hidden, 0.0)
        grad_v[:, low:end] += torch.bmm(weights.to(v.dtype).view(rows, -1, end - low).transpose(1, 2), g)
        dots = _wide(torch.bmm(g, values[:, low:end].transpose(1, 2))).view_as(weights)
        ds = weights.mul_(dots.add_(_by_group(offset, groups))).mul_(scale)
        if softcap:
            ds = ds.mul_(1 - (raw / (softcap * LOG2_E)).square())
        ds = ds.to(q.dtype).view(rows, -1, end - low)
        grad_q[:, here] = _by_token(torch.bmm(ds, keys[:, low:end]).view_as(queries))
        grad_k[:, low:end] += torch.bmm(ds.transpose(1, 2), queries.view(rows, -1, q.shape[-1]))
    dk, dv = (x.view(batch, groups, length, -1).transpose(1, 2).to(like.dtype).contiguous() for x, like in ((grad_k, k), (grad_v, v)))
    return grad_q, dk, dv


@attend_window_backward.register_fake
def _(saved: list[Tensor], incoming: list[Tensor], window: int, scale: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved[:3])
    return q, k, v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.settings = inputs[4:]


def _backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.weft.attend_window_backward(list(ctx.saved_tensors), list(incoming), *ctx.settings)
    return (*gradients, None, None, None, None)


attend_window.register_autograd(_backward, setup_context=_setup_context)


def spans(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """For each block of queries its first key, its first query, and the end of both."""
    for start in range(0, length, BLOCK):
        yield max(0, start - window + 1), start, min(start + BLOCK, length)


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Scores [B, G, S, C, K] times log2 e of queries [B, G, S, C, D] and keys [N, K, D], and the mask that fits them."""
    batch, groups, share, rows, width = q.shape
    scores = torch.bmm(q.reshape(batch * groups, share * rows, width), k.transpose(1, 2)).view(batch, groups, share, rows, -1)
    scores = _wide(scores) * (scale * LOG2_E if not softcap else scale / softcap)
    return scores if not softcap else scores.tanh_().mul_(softcap * LOG2_E), hidden[:, None, None]


def _hidden(first: Tensor, low: int, start: int, end: int, window: int) -> Tensor:
    """Which keys low ... end - 1 queries start ... end - 1 may not look at, bool [1 or B, C, K]."""
    query = torch.arange(start, end, device=first.device)[:, None]
    key = torch.arange(low, end, device=first.device)
    earliest = torch.maximum(first[:, start:end, None], query - window + 1)
    return (key < earliest) | (key > query)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, C, H, D] -> [B, G, S, C, D], contiguous."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous()


def _by_row(x: Tensor) -> Tensor:
    """[B, T, G, D] -> [N, T, D], contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _by_token(x: Tensor) -> Tensor:
    """[B, G, S, C, D] -> [B, C, H, D]."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
