"""The fast forms of attention against the naive one: outputs and gradients, odd sizes, and a control that must fail."""

import pytest
import torch

from weft.nn.attend import attend_fused, attend_grouped, attend_naive

SHAPES = [(1, 1, 1, 1, 1, 2), (2, 5, 7, 4, 2, 6), (3, 13, 13, 6, 1, 5), (2, 9, 17, 3, 3, 8)]  # B, T, K, H, G, D


def inputs(shape, dtype=torch.float64, narrower=0):
    """Values have `narrower` channels fewer than keys."""
    batch, length, keys, heads, groups, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, length, heads, width, generator=generator, dtype=dtype)
    k, v = (torch.randn(batch, keys, groups, size, generator=generator, dtype=dtype) for size in (width, width - narrower))
    positions = torch.arange(keys - length, keys)
    mask = torch.arange(keys) <= positions[:, None]
    return q, k, v, mask.expand(batch, -1, -1)


def gradients(attend, q, k, v):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_equals_naive(shape, softcap):
    q, k, v, mask = inputs(shape)
    want = gradients(lambda q, k, v: attend_naive(q, k, v, mask, 0.4, softcap), q, k, v)
    got = gradients(lambda q, k, v: attend_grouped(q, k, v, mask, 0.4, softcap), q, k, v)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    if shape[2] > 1:
        wrong = attend_grouped(q, k, v, mask, 0.41, softcap)
        assert (wrong - want[0]).abs().max() > 1e-4, "control: another scale shows"


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_equals_naive(shape, masked):
    q, k, v, mask = inputs(shape)
    if not masked and shape[1] != shape[2]:
        pytest.skip("without a mask the fused form is the square causal one")
    want = gradients(lambda q, k, v: attend_naive(q, k, v, mask, 0.4), q, k, v)
    got = gradients(lambda q, k, v: attend_fused(q, k, v, mask if masked else None, 0.4), q, k, v)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_may_be_narrower_than_keys(shape):
    q, k, v, mask = inputs(shape, narrower=1)
    want = gradients(lambda q, k, v: attend_naive(q, k, v, mask, 0.4), q, k, v)
    assert want[0].shape[-1] == shape[-1] - 1
    for attend in (attend_grouped, attend_fused):
        got = gradients(lambda q, k, v, attend=attend: attend(q, k, v, mask, 0.4), q, k, v)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    wrong = attend_fused(q, k, v.roll(1, -1), mask, 0.4)
    assert shape[-1] == 2 or (wrong - want[0]).abs().max() > 1e-4, "control: channels in another order show"


def test_a_query_without_keys_gives_zeros_and_stays_finite():
    q, k, v, mask = inputs((2, 5, 7, 4, 2, 6))
    mask = mask.clone()
    mask[0, 2] = False
    for attend in (attend_naive, attend_grouped):
        out = attend(q, k, v, mask, 0.4)
        assert torch.isfinite(out).all()
        assert (out[0, 2] == 0).all()
        assert (out[1] != 0).any()


def test_rows_of_a_batch_do_not_depend_on_each_other_bit_for_bit_in_bfloat16():
    q, k, v, mask = inputs((5, 3, 64, 6, 2, 16), torch.bfloat16)
    together = attend_grouped(q, k, v, mask, 0.25)
    alone = torch.cat([attend_grouped(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1], 0.25) for i in range(5)])
    assert torch.equal(together, alone)


def test_dropout_keeps_the_expectation():
    q, k, v, mask = inputs((2, 5, 7, 4, 2, 6))
    torch.manual_seed(0)
    clean = attend_grouped(q, k, v, mask, 0.4)
    noisy = torch.stack([attend_grouped(q, k, v, mask, 0.4, dropout=0.3) for _ in range(3000)])
    assert (noisy[0] - clean).abs().max() > 0.01
    assert (noisy.mean(0) - clean).abs().max() < 0.1
