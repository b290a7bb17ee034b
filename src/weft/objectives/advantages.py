"""What reinforcement learning from a language model's answers is made of, on plain tensors [N, T]: a row an answer, a place a token.

`mask` [N, T] is True at the places whose next token belongs to the answer; they lie side by side in a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from weft.train.parallel import World


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages, A_t = sum over k of (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}) (Schulman et al. 2016, equation 16);
    after an answer's last token there is nothing left to come. Zero outside the mask.

    One product with the powers of gamma * lam, in float64 on a CPU.
    """
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64
    length = rewards.shape[1]
    kept = values.to(wide) * mask
    following = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], 1)
    deltas = (rewards.to(wide) + gamma * following - kept) * mask
    ahead = torch.arange(length, device=rewards.device)
    ahead = ahead[:, None] - ahead[None, :]
    powers = torch.where(ahead >= 0, (gamma * lam) ** ahead.clamp(min=0).to(wide), 0.0)
    advantages: Tensor = deltas @ powers * mask
    return advantages.to(rewards.dtype)


def naive_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The recursion A_t = delta_t + gamma lam A_{t+1}, place by place; the twin that `gae` is tested against."""
    advantages = torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        coming, value_after = 0.0, 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[row, t]:
                value = float(values[row, t])
                coming = float(rewards[row, t]) + gamma * value_after - value + gamma * lam * coming
                advantages[row, t], value_after = coming, value
    return advantages


def whiten(values: Tensor, mask: Tensor, world: World, eps: float = 1e-8) -> Tensor:
    """Values with mean 0 and variance 1 over the mask of all processes' rows; zero outside the mask."""
    kept = values.double() * mask
    count, total, square = world.sum(torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])).unbind()
    mean = total / count.clamp(min=1)
    variance = (square / count.clamp(min=1) - mean.square()).clamp(min=0)
    return ((values - mean) / (variance + eps).sqrt() * mask).to(values.dtype)


def group_advantages(rewards: Tensor, samples: int, scale: bool, eps: float = 1e-4) -> Tensor:
    """Each answer's reward less the mean of its group, `samples` answers to one prompt that lie side by side, over the group's standard
    deviation where `scale` (Shao et al. 2024, section 4.1.2). rewards [N] to [N]; a group of equals has none."""
    groups = rewards.view(-1, samples)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    return advantages.view(-1)


class Clipped(NamedTuple):
    """losses, and where the clip holds the gradient back, in the shape of what they were made of."""

    losses: Tensor
    clipped: Tensor


def clipped_policy(log_probs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Clipped:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old (Schulman et al. 2017, equation 7)."""
    ratio = (log_probs - old).exp()
    free, held = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return Clipped(-torch.minimum(free, held), (held < free).detach())


def clipped_value(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Clipped:
    """Half the squared error, the larger of that of the value and that of one held within `clip` of what the rollout had (as Schulman's
    and Ziegler's own code do)."""
    free = (values - returns).square()
    if clip is None:
        return Clipped(0.5 * free, torch.zeros_like(free, dtype=torch.bool))
    held = (old + (values - old).clamp(-clip, clip) - returns).square()
    return Clipped(0.5 * torch.maximum(free, held), (held > free).detach())


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """r - 1 - log r with r = reference / policy: an estimate of KL(policy || reference) from a token drawn from the policy that is never
    negative (Schulman 2020; Shao et al. 2024, equation 4)."""
    difference = reference - log_probs
    return difference.exp() - difference - 1


def controlled(beta: float, kl: float, target: float, gain: float) -> float:
    """Ziegler's controller: beta (1 + gain * clip(kl / target - 1, -0.2, 0.2)) (Ziegler et al. 2019, section 2.2, with gain 0.1)."""
    return beta * (1 + gain * max(-0.2, min(0.2, kl / target - 1)))
