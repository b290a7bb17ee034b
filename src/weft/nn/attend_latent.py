"""Attention over latents (DeepSeek-AI 2024, "DeepSeek-V2", equations 9 to 19): one naive form to read, two fast ones to run.

A token is remembered as a latent c and a rotated key r that all heads share. Head h has two matrices, and with them the key [U_h c; r]
and the value W_h c. Expanded, keys and values are written out and attended to as always. Absorbed, the query goes to the latents
instead: q . (U_h c) = (U_h^T q) . c, and since the values' matrix may wait until after the weighted sum, latents are all that is read.

Expanding reads every latent once and makes H (N + V) numbers of it; absorbing costs a query 2 (R - N) + 2 (R - V) / 2 products more a
key and head. `expanding_pays_from` says where the two meet.

Shapes: B batch, T queries, K keys, H heads, R channels of a latent, N of a head's query without position, P of its rotated part, V of a
value. q_nope [B, T, H, N], q_rope [B, T, H, P], latent [B, K, R], rope_key [B, K, P], up [H (N + V), R] with a head's U above its W,
mask bool [B, T, K]. Every form returns [B, T, H, V]; a query with no key to look at gives zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.nn.attend import attend_grouped, attend_naive
from weft.nn.linear import affine

MANY = 512  # queries of all heads: from so many on, 16-bit products with keys are quicker the usual way round


def attend_latent_naive(q_nope: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, up: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The definition, head by head; the twin that the fast forms are tested against."""
    heads, width = q_nope.shape[2:]
    outputs = []
    for head, both in enumerate(up.chunk(heads)):
        key, value = latent @ both[:width].T, latent @ both[width:].T
        query = torch.cat([q_nope[:, :, head], q_rope[:, :, head]], -1)
        outputs.append(attend_naive(query[:, :, None], torch.cat([key, rope_key], -1)[:, :, None], value[:, :, None], mask, scale))
    return torch.cat(outputs, 2)


def expand(latent: Tensor, rope_key: Tensor, up: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """Keys [B, K, H, N + P] and values [B, K, H, V] of latents; `width` is N."""
    both = affine(latent, up).view(*latent.shape[:2], heads, -1)
    key, value = both[..., :width], both[..., width:]
    shared = rope_key.to(key.dtype)[:, :, None].expand(-1, -1, heads, -1)
    return torch.cat([key, shared], -1), value


def attend_expanded(q_nope: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, up: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Write keys and values out, then attend."""
    keys, values = expand(latent, rope_key, up, *q_nope.shape[2:])
    return attend_grouped(torch.cat([q_nope, q_rope], -1), keys, values, mask, scale)


def attend_absorbed(q_nope: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, up: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend in the space of latents: all heads read the same keys and the same values, as in multi-query attention.

    Softmax runs in float32 (float64 stays). Rows do not depend on their batch-mates.
    """
    batch, length, heads, width = q_nope.shape
    up_key, up_value = up.view(heads, -1, up.shape[1]).split([width, up.shape[0] // heads - width], 1)
    query = torch.cat([_by_head(q_nope * scale, up_key), q_rope * scale], -1).view(batch, length * heads, -1)
    scores = _wide(_products(query, torch.cat([latent, rope_key], -1)))
    # The lowest finite number, not -inf: a row without any key must stay finite; such a row is then zeroed.
    scores = scores.view(batch, length, heads, -1).masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    mixed = scores.softmax(-1).to(latent.dtype).view(batch, length * heads, -1) @ latent
    up_value = up_value.contiguous() if mixed.dtype.itemsize == 2 else up_value  # a transposed slice takes torch seven times as long
    return _by_head(mixed.view(batch, length, heads, -1), up_value.transpose(1, 2)) * mask.any(-1)[:, :, None, None]


def expanding_pays_from(rank: int, nope: int, value: int) -> int | None:
    """The fewest queries of a pass for which writing keys and values out takes fewer operations than absorbing; None: it never does.

    Expanding costs R (N + V) products a key and head once, absorbing 2 R - N - V more a key, head and query.
    """
    extra = 2 * rank - nope - value
    return rank * (nope + value) // extra + 1 if extra > 0 else None


def _products(query: Tensor, key: Tensor) -> Tensor:
    """query [B, M, D], key [B, K, D] -> [B, M, K].

    In 16 bits torch takes up to ten times as long where the large side is the transposed one, so few queries stand on the right. The bits
    are the same: every number is one sum over D, rounded once.
    """
    if query.dtype.itemsize == 2 and query.shape[1] < MANY:
        return (key @ query.transpose(1, 2)).transpose(1, 2).contiguous()
    return query @ key.transpose(1, 2)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, H, I] times weight [H, I, O], head by head: [B, T, H, O].

    As in `weft.nn.linear.affine`, a few rows are given company on a CPU, so that torch computes them as it computes many; in float32 too,
    in which quantised models compute.
    """
    batch, length, heads, _ = x.shape
    rows = x.reshape(batch * length, heads, -1)
    fewest = max(2, 16**3 // weight.numel() + 1) if x.dtype.itemsize == 2 else 4
    if x.device.type == "cpu" and batch * length < fewest:
        rows = F.pad(rows, (0, 0, 0, 0, 0, fewest - batch * length))
    y = torch.bmm(rows.transpose(0, 1), weight.to(x.dtype))[:, : batch * length]
    return y.transpose(0, 1).contiguous().view(batch, length, heads, -1)  # also of one row, whose product would else be another kernel's


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
