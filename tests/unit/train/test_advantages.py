"""PPO's and GRPO's arithmetic against hand-worked numbers and against definitions written out place by place in float64."""

import math

import pytest
import torch

from weft.objectives.advantages import clipped_policy, clipped_value, controlled, gae, group_advantages, k3, naive_gae, whiten
from weft.train.parallel import World


def masked(rows=5, length=11, seed=0):
    """Answers of odd lengths that begin and end at odd places; one is a single token."""
    draw = torch.Generator().manual_seed(seed)
    starts, sizes = [0, 3, 1, 10, 4], [11, 5, 1, 1, 6]
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        mask[row, start : start + size] = True
    return mask, *(torch.randn(rows, length, generator=draw, dtype=torch.float64) for _ in range(3))


def test_advantages_worked_by_hand():
    # Two tokens, gamma 0.9, lambda 0.5: delta_2 = 1 - 0.4 = 0.6; delta_1 = -0.1 + 0.9 * 0.4 - 0.2 = 0.06; A_1 = 0.06 + 0.45 * 0.6 = 0.33.
    rewards, values = (torch.tensor([row], dtype=torch.float64) for row in ([7.0, -0.1, 1.0, 7.0], [9.0, 0.2, 0.4, 9.0]))
    mask = torch.tensor([[False, True, True, False]])
    expected = torch.tensor([[0.0, 0.33, 0.6, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.5), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(
        gae(rewards, values, torch.ones_like(mask), 0.9, 0.5), expected, atol=0.1
    )  # what is not the answer's is left out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_equal_the_recursion(gamma, lam):
    mask, rewards, values, _ = masked()
    found, expected = gae(rewards, values, mask, gamma, lam), naive_gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - naive_gae(rewards, values, mask, gamma, lam - 0.01)).abs().max() > 1e-3 or lam == 0.0
    assert found[~mask].abs().max() == 0


def test_lambda_1_gives_returns_less_values():
    mask, rewards, values, _ = masked(seed=1)
    returns = (rewards * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0), (returns - values) * mask, rtol=0, atol=1e-10)


def test_whitening_sees_answers_alone():
    mask, values, _, _ = masked(seed=2)
    found = whiten(values, mask, World())
    assert found[mask].mean().abs() < 1e-12
    assert abs(float(found[mask].var(correction=0)) - 1) < 1e-6
    assert found[~mask].abs().max() == 0
    assert (found[mask] - ((values - values.mean()) / values.std())[mask]).abs().max() > 1e-3


def test_group_advantages_worked_by_hand():
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    std = math.sqrt(2 / 3)
    expected = torch.tensor([-1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, 4, scale=False), expected)
    torch.testing.assert_close(group_advantages(rewards, 4, scale=True), expected / (std + 1e-4))
    assert not torch.allclose(group_advantages(rewards, 8, scale=False), expected)


def test_the_clipped_ratio_case_by_case():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0], dtype=torch.float64)
    log_probs = (ratios.log() - 1.0).requires_grad_()
    found = clipped_policy(log_probs, torch.full_like(ratios, -1.0), advantages, 0.2, 0.3)
    torch.testing.assert_close(found.losses, torch.tensor([-2.6, 3.0, -1.0, 1.6, -3.3], dtype=torch.float64))
    assert found.clipped.tolist() == [True, False, False, True, False]
    (slope,) = torch.autograd.grad(found.losses.sum(), log_probs)
    torch.testing.assert_close(slope, torch.tensor([0.0, 3.0, -1.0, 0.0, -3.3], dtype=torch.float64))


def test_the_clipped_value_case_by_case():
    values = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(3, dtype=torch.float64), torch.tensor([2.0, -2.0, 2.0], dtype=torch.float64)
    found = clipped_value(values, old, returns, 0.2)
    torch.testing.assert_close(found.losses, 0.5 * torch.tensor([1.8**2, 9.0, 1.9**2], dtype=torch.float64))
    assert found.clipped.tolist() == [True, False, False]
    (slope,) = torch.autograd.grad(found.losses.sum(), values)
    torch.testing.assert_close(slope, torch.tensor([0.0, 3.0, -1.9], dtype=torch.float64))
    torch.testing.assert_close(clipped_value(values, old, returns, None).losses, 0.5 * (values - returns).square())


def test_k3_estimates_the_divergence_of_two_distributions():
    p, q = (torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(0) for seed in (1, 2))
    each = k3(p, q)
    torch.testing.assert_close((p.exp() * each).sum(), (p.exp() * (p - q)).sum(), rtol=0, atol=1e-12)
    assert bool((each >= 0).all())
    assert ((q.exp() * each).sum() - (p.exp() * (p - q)).sum()).abs() > 1e-3  # of tokens drawn from the policy, not from the reference


def test_the_controller_worked_by_hand():
    assert controlled(0.2, 6.3, 6.0, 0.1) == pytest.approx(0.2 * (1 + 0.1 * 0.05))
    assert controlled(0.2, 60.0, 6.0, 0.1) == pytest.approx(0.2 * 1.02)
    assert controlled(0.2, 0.0, 6.0, 0.1) == pytest.approx(0.2 * 0.98)
    assert controlled(0.2, 6.0, 6.0, 0.1) == 0.2
