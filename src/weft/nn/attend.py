"""Scaled dot-product attention (Vaswani et al. 2017, equation 1): one naive form to read, two fast ones to run.

Shapes: B batch, T queries, K keys, H heads, G key-value heads, D channels a head. Queries [B, T, H, D], keys and values [B, K, G, D],
masks bool [B, T, K] (True may look). Query head h reads key-value head h // (H / G). A query with no key to look at gives zeros. Values
may have another width than keys; outputs have theirs. A `sink` [H] is one more logit a head beside the scores, which belongs to no value:
weights then sum to less than 1 (gpt-oss, OpenAI 2025).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_naive(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None = None, sink: Tensor | None = None
) -> Tensor:
    """The definition, head by head; the twin that the fast forms are tested against. Returns [B, T, H, D]."""
    group = q.shape[2] // k.shape[2]
    outputs = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if sink is not None:
            scores = torch.cat([scores, sink[head].to(scores.dtype).expand(*scores.shape[:2], 1)], -1)
        weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[1]]
        outputs.append(weights @ v[:, :, head // group])
    return torch.stack(outputs, 2)


def attend_grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """Two batched products a key-value head, its queries side by side: no repeated keys, and the same kernel for every T.

    Softmax runs in float32 (float64 stays). Rows do not depend on their batch-mates. Returns [B, T, H, D].
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    share = heads // groups
    folded = q.view(batch, length, groups, share, width).permute(0, 2, 3, 1, 4).reshape(batch, groups, share * length, width)
    scores = torch.matmul(folded * scale, k.permute(0, 2, 3, 1)).view(batch, groups, share, length, -1)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The lowest finite number, not -inf: a row without any key must stay finite; such a row is then zeroed.
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    if sink is None:
        weights = scores.softmax(-1)
    else:
        extra = sink.to(scores.dtype).view(groups, share, 1, 1).expand(batch, -1, -1, length, 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    weights = weights * mask.any(-1)[:, None, None, :, None]
    weights = F.dropout(weights, dropout).to(v.dtype) if dropout else weights.to(v.dtype)
    mixed = torch.matmul(weights.view(batch, groups, share * length, -1), v.transpose(1, 2))
    return mixed.view(batch, groups, share, length, -1).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """Torch's fused kernel for the parallel pass; `mask` None means plainly causal. Returns [B, T, H, D].

    Every query must have a key to look at: in the parallel pass it has itself.
    """
    width = v.shape[-1]
    if width < k.shape[-1]:  # torch's kernels want equal widths, and what it does otherwise holds all T x K weights at once
        v = F.pad(v, (0, k.shape[-1] - width))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    share = q.shape[1] // k.shape[1]
    if share > 1:  # the CPU kernel takes equal heads only, and repeating the few keys costs less than its unfused fallback
        k, v = (t.repeat_interleave(share, dim=1) for t in (k, v))
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[:, None], dropout_p=dropout, is_causal=mask is None, scale=scale
    )
    return mixed.transpose(1, 2)[..., :width]
