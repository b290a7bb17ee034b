"""The rules of merging against examples worked by hand and against their definitions in float64, number by number."""

import math

import pytest
import torch

from weft.merge.combine import decaying, linear, magnitude, shares, slerp, ties


def vectors(count, size=101, seed=0):
    return list(torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def test_linear_by_hand():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 0.0])
    assert linear((a, b), shares([3, 1])).tolist() == [2.0, 1.5]
    assert a.tolist() == [1.0, 2.0], "what is given is not changed"
    assert linear((a, b), shares([1, 3])).tolist() == [4.0, 0.5], "control: the weights matter"


def test_an_exponential_average_weighs_the_last_most():
    assert decaying(3, 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert decaying(4, 1.0) == pytest.approx([0.25] * 4)
    running = None
    values = vectors(5)
    for value in values:  # the running form, begun with the first value as if it had been there for ever
        running = value if running is None else 0.8 * running + 0.2 * value
    total = linear(values, decaying(5, 0.8))
    first = 0.8**4 - 0.2 * 0.8**4
    scale = sum(0.2 * 0.8**k for k in range(5))
    torch.testing.assert_close(running, total * scale + first * values[0], rtol=0, atol=1e-12)


def test_slerp_by_hand():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    half = slerp(x, y, 0.5)
    torch.testing.assert_close(half, torch.tensor([math.sqrt(0.5)] * 2))
    torch.testing.assert_close(slerp(x, y, 1 / 3), torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert linear((x, y), (0.5, 0.5)).norm() < 0.8 < half.norm(), "control: the straight way is shorter"
    torch.testing.assert_close(slerp(x, 3 * x, 0.5), 2 * x)
    torch.testing.assert_close(slerp(x, -x, 0.25), 0.5 * x)
    torch.testing.assert_close(slerp(x, torch.zeros(2), 0.25), 0.75 * x)


def test_slerp_walks_evenly_over_a_sphere():
    a, b = (vector / vector.norm() for vector in vectors(2))
    whole = torch.arccos(a @ b)
    for t in (0.0, 0.2, 0.9, 1.0):
        point = slerp(a, b, t)
        assert point.norm().item() == pytest.approx(1, abs=1e-12)
        assert torch.arccos((a @ point).clamp(-1, 1)).item() == pytest.approx(t * whole.item(), abs=1e-7)


def test_ties_by_hand():
    base = torch.zeros(4)
    a, b, c = torch.tensor([4.0, 1.0, -2.0, 3.0]), torch.tensor([2.0, -5.0, -4.0, -1.0]), torch.tensor([-3.0, 2.0, 0.5, -1.0])
    # Trimmed to magnitudes of 2 and more: a = [4, ., -2, 3], b = [2, -5, -4, .], c = [-3, 2, ., .]. Signs by sum: +3, -3, -6, +3.
    got = ties(base, (a, b, c), (2, 2, 2), (1, 1, 1))
    assert got.tolist() == [3.0, -5.0, -3.0, 3.0]
    assert ties(base + 1, (a + 1, b + 1, c + 1), (2, 2, 2), (1, 1, 1), scale=0.5).tolist() == [2.5, -1.5, -0.5, 2.5]
    assert ties(base, (a, b, c), (0, 0, 0), (1, 1, 1)).tolist() == [3.0, -5.0, -3.0, 3.0]
    assert ties(base, (a, b), (2, 2), (1, 3)).tolist() == [2.5, -5.0, -3.5, 3.0]
    assert ties(base, (a, -a), (0, 0), (1, 1)).tolist() == [0.0] * 4, "where the vote is even nothing changes"


def naive_ties(base, models, density, scale):
    """Algorithm 1 of Yadav et al. 2023, number by number."""
    changes = [model - base for model in models]
    count = round(density * base.numel())
    kept = []
    for change in changes:
        least = change.abs().sort(descending=True).values[count - 1]
        kept.append([value if abs(value) >= least else 0.0 for value in change.tolist()])
    merged = []
    for column in zip(*kept, strict=True):
        sign = math.copysign(1, sum(column)) if sum(column) else 0
        agreeing = [value for value in column if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return base + scale * torch.tensor(merged, dtype=base.dtype)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_its_definition(density):
    base, *models = (vector.float().double() for vector in vectors(4, seed=2))
    thresholds = [magnitude(lambda model=model: [model - base], density) for model in models]
    got = ties(base, models, thresholds, (1, 1, 1), 0.7)
    want = naive_ties(base, models, density, 0.7)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    other = naive_ties(base, models, density * 0.5, 0.7)
    assert (got - other).abs().max() > 1e-3, "control: another density is another model"


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_the_magnitude_that_a_share_reaches_is_exact_over_several_tensors(density):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=generator) * s for n, s in ((1000, 1), (7, 1e-20), (333, 100.0))]
    found = magnitude(lambda: tensors, density)
    everything = torch.cat(tensors).abs().sort(descending=True).values
    assert found == everything[max(1, round(density * 1340)) - 1].item()
    assert magnitude(lambda: [torch.zeros(5)], density) == 0
