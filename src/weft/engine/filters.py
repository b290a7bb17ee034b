"""From logits to the distribution that is sampled: each step a function over rows [B, V], none of which looks at another row.

Filters cut by a threshold of value, so that equally likely tokens stay or go together and their order in the vocabulary plays no
part. A token is taken out by a logit of -inf. Parameters are tensors [B].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NUCLEUS_GUESS = 1024


def penalise_repeats(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive logits of `seen` [B, V] tokens by the penalty and multiply negative ones (Keskar et al. 2019, equation 2)."""
    factor = penalty[:, None]
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
    return logits.masked_fill((logits < least) & (k > 0)[:, None], -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the likeliest tokens until they reach probability p, the one that reaches it included (Holtzman et al. 2020, section 3.1)."""
    if bool((p >= 1).all()):
        return logits
    probs = logits.softmax(-1)
    ranked = probs.topk(min(NUCLEUS_GUESS, probs.shape[-1])).values
    if bool((ranked.cumsum(-1)[:, -1] < p).any()):  # the nucleus of some row is wider than guessed
        ranked = probs.sort(descending=True).values
    before = F.pad(ranked.cumsum(-1)[:, :-1], (1, 0))
    last = (before < p[:, None]).sum(-1, keepdim=True) - 1
    least = ranked.gather(1, last.clamp(min=0))
    return logits.masked_fill((probs < least) & (p < 1)[:, None], -torch.inf)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens with at least p times the probability of the likeliest one (Nguyen et al. 2024, equation 1)."""
    if bool((p <= 0).all()):
        return logits
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p[:, None] * probs.amax(-1, keepdim=True), -torch.inf)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample ids [B] from rows [B, V] by inverting their cumulative sums at uniforms [B] in [0, 1)."""
    # float64, as the last tokens of a large vocabulary would else share one rounded sum; Apple's GPUs have none.
    wide = probs if probs.device.type == "mps" else probs.double()
    cumulative = wide.cumsum(-1)
    point = uniforms.to(wide)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
