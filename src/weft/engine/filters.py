"""From logits to the distribution that is sampled: each step a function over rows [B, V], none of which looks at another row.

Filters cut by a threshold of value, so that equally likely tokens stay or go together and their order in the vocabulary plays no
part. A token is taken out by a logit of -inf. Parameters are tensors [B].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NUCLEUS_GUESSES = (128, 1024)
BLOCK = 64


def penalise_repeats(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive logits of `seen` [B, V] tokens by the penalty and multiply negative ones (Keskar et al. 2019, equation 2)."""
    factor = penalty.clamp(1e-9, 1e9)[:, None]  # beyond these nothing is left to change, and numbers would become infinite
    return torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)


def penalise_counts(logits: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Take presence once, and frequency as often as counted, from the logits of tokens generated so far; counts [B, V]."""
    return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts


def heat(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits over temperature, shifted so that the largest is 0: no temperature above 0, however small, overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=1e-6)[:, None]


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k likeliest tokens of each row (0: all), and those equal to the last of them (Fan et al. 2018)."""
    most = min(int(k.max()), logits.shape[-1])
    if most == 0:
        return logits
    best = logits.topk(most).values
    least = best.gather(1, (k.clamp(1, most) - 1)[:, None])
    return _without(logits, logits < torch.where((k > 0)[:, None], least, -torch.inf))


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the likeliest tokens until they reach probability p, the one that reaches it included (Holtzman et al. 2020, section 3.1)."""
    if bool((p >= 1).all()):
        return logits
    probs = logits.softmax(-1)
    ranked = _most_likely(probs, p)
    before = F.pad(ranked.cumsum(-1)[:, :-1], (1, 0))
    last = (before < p[:, None]).sum(-1, keepdim=True) - 1
    least = ranked.gather(1, last.clamp(min=0))
    return _without(logits, probs < torch.where((p < 1)[:, None], least, 0.0))


def _most_likely(probs: Tensor, p: Tensor) -> Tensor:
    """The largest of probabilities [B, V] in order, as many as reach p [B] in every row where p is below 1."""
    p = torch.where(p < 1, p, 0.0)
    for guess in NUCLEUS_GUESSES:
        ranked = probs.topk(min(guess, probs.shape[-1])).values
        if bool((ranked.cumsum(-1)[:, -1] >= p).all()):
            return ranked
    # All that are below half of (1 - p) / V come to less than 1 - p together: the others reach p.
    needed = (probs >= (1 - p)[:, None] / (2 * probs.shape[-1])) & (p > 0)[:, None]
    return probs.topk(int(needed.sum(-1).max())).values


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens with at least p times the probability of the likeliest one (Nguyen et al. 2024, equation 1)."""
    if bool((p <= 0).all()):
        return logits
    probs = logits.softmax(-1)
    return _without(logits, probs < p[:, None] * probs.amax(-1, keepdim=True))


def _without(logits: Tensor, gone: Tensor) -> Tensor:
    """Logits with -inf where `gone`."""
    return torch.where(gone, -torch.inf, logits)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample ids [B] from rows [B, V] by inverting their cumulative sums at uniforms [B] in [0, 1).

    First among blocks of tokens, then in the block: sums of all tokens in float64 would cost as much as the softmax.
    """
    batch, vocab = probs.shape
    blocks = F.pad(probs, (0, -vocab % BLOCK)).view(batch, -1, BLOCK)
    # float64, as the last tokens of a large vocabulary would else share one rounded sum; Apple's GPUs have none.
    dtype = probs.dtype if probs.device.type == "mps" else torch.float64
    sums = blocks.sum(-1, dtype=dtype).cumsum(-1)
    point = uniforms.to(sums)[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, point, right=True).clamp(max=sums.shape[1] - 1)
    before = F.pad(sums, (1, 0)).gather(1, block)
    within = blocks[torch.arange(batch, device=probs.device), block[:, 0]].to(dtype).cumsum(-1)
    # Below the block's own sum, however it was rounded: the token that is found then has a probability above 0.
    point = torch.minimum(point - before, within[:, -1:] * (1 - 1e-12 if dtype == torch.float64 else 1 - 1e-6))
    return block[:, 0] * BLOCK + torch.searchsorted(within, point, right=True)[:, 0]
