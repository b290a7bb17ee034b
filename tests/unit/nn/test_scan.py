"""The parallel scan against the loop: values, gradients, final state, odd lengths, resets and padding."""

import pytest
import torch

from weft.nn.scan import CHUNK, linear_scan, scan_naive

LENGTHS = [1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def inputs(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    a = torch.rand(2, length, 3, 4, generator=generator, dtype=dtype)
    a[:, length // 2] = 0  # a reset inside the row
    return a, torch.randn(2, length, 3, 4, generator=generator, dtype=dtype), torch.randn(2, 3, 4, generator=generator, dtype=dtype)


@pytest.mark.parametrize("length", LENGTHS)
def test_parallel_equals_recurrent(length):
    outcomes = []
    for scan in (scan_naive, linear_scan):
        a, b, before = (t.requires_grad_() for t in inputs(length))
        h = scan(a, b, before)
        (h * torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)).sum().backward()
        outcomes.append([h.detach(), a.grad, b.grad, before.grad])
    for want, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_gradient_by_finite_differences():
    a, b, before = (t.requires_grad_() for t in inputs(9))
    assert torch.autograd.gradcheck(linear_scan, (a, b, before))


def test_what_follows_changes_no_bit():
    a, b, before = inputs(3 * CHUNK + 5, torch.float32)
    whole = linear_scan(a, b, before)
    for length in (2, CHUNK, CHUNK + 3):
        assert torch.equal(linear_scan(a[:, :length], b[:, :length], before), whole[:, :length])


def test_a_forgotten_carry_is_noticed():
    a, b, before = inputs(2 * CHUNK)
    assert (linear_scan(a, b, torch.zeros_like(before)) - linear_scan(a, b, before)).abs().max() > 0.1
