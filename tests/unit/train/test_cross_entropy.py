"""The chunked loss against its naive twin, with gradients, and against transformers on a whole model."""

import pytest
import torch
import torch.nn.functional as F

from weft.objectives import cross_entropy
from weft.objectives.cross_entropy import Smoothing, Sums, linear_cross_entropy, naive_cross_entropy
from weft.objectives.head import Head

TOKENS, DIM, IDS = 77, 12, 53


def _run(compute, dtype=torch.float64, smoothing=Smoothing(), softcap=None, bias=True, **more) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(IDS, DIM, generator=generator, dtype=dtype).requires_grad_()
    offset = torch.randn(IDS, generator=generator, dtype=dtype).requires_grad_() if bias else None
    targets = torch.randint(IDS, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) > 0.4
    sums = compute(hidden, Head(weight, offset, softcap), targets, mask, smoothing, **more)
    (0.37 * sums.loss).backward()
    found = [sums.loss.detach(), sums.nll, hidden.grad, weight.grad]
    return found if offset is None else [*found, offset.grad]


@pytest.mark.parametrize("chunk", [1, 10, 77, 1000])
@pytest.mark.parametrize(
    ("smoothing", "softcap", "bias"),
    [(Smoothing(), None, False), (Smoothing(0.1), None, True), (Smoothing(0.0, 1e-2), 5.0, False), (Smoothing(0.2, 1e-3), 3.0, True)],
)
def test_chunked_loss_and_gradients_equal_the_naive_ones(chunk, smoothing, softcap, bias):
    naive = _run(naive_cross_entropy, smoothing=smoothing, softcap=softcap, bias=bias)
    chunked = _run(linear_cross_entropy, smoothing=smoothing, softcap=softcap, bias=bias, chunk=chunk)
    for expected, found in zip(naive, chunked, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Negative control: each addend matters.
    if smoothing != Smoothing():
        plain = _run(linear_cross_entropy, softcap=softcap, bias=bias, chunk=chunk)
        assert (plain[0] - chunked[0]).abs() > 1e-3
        assert (plain[3] - chunked[3]).abs().max() > 1e-4


def test_logits_far_from_zero_lose_nothing():
    hidden, weight = torch.randn(9, 4, dtype=torch.float64) * 300, torch.randn(11, 4, dtype=torch.float64) * 300
    targets, mask = torch.arange(9), torch.ones(9, dtype=torch.bool)
    naive, chunked = (
        compute(hidden, Head(weight), targets, mask, Smoothing(0.1, 1e-9)) for compute in (naive_cross_entropy, linear_cross_entropy)
    )
    assert torch.isfinite(chunked.loss)
    torch.testing.assert_close(chunked.loss, naive.loss, rtol=1e-12, atol=0)


def test_the_mask_decides_what_counts():
    _, _, hidden, *_ = _run(linear_cross_entropy, chunk=10)
    generator = torch.Generator().manual_seed(0)
    for shape in ((TOKENS, DIM), (IDS, DIM), (IDS,)):
        torch.randn(*shape, generator=generator, dtype=torch.float64)
    torch.randint(IDS, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) > 0.4
    assert torch.equal(hidden.abs().sum(-1) > 0, mask)


def test_only_tokens_that_count_go_through_the_head(monkeypatch):
    seen, sweep = [], cross_entropy._sweep

    def counting(hidden, *more):
        seen.append(len(hidden))
        return sweep(hidden, *more)

    monkeypatch.setattr(cross_entropy, "_sweep", counting)
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4)
    for counted in (4, 9, 0):
        mask = torch.arange(9) >= 9 - counted
        hidden.grad = None
        linear_cross_entropy(hidden, Head(weight), torch.arange(9), mask).loss.backward()
        assert torch.equal(hidden.grad.abs().sum(-1) > 0, mask)
    assert seen == [4, 9, 1]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_frozen_head_is_one_operation_to_a_compiler(softcap):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(IDS, DIM, generator=generator, dtype=torch.float64)
    targets, mask = torch.randint(IDS, (TOKENS,), generator=generator), torch.rand(TOKENS, generator=generator) > 0.4
    given = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64)

    def loss(hidden):
        sums = linear_cross_entropy(hidden, Head(weight, None, softcap), targets, mask, Smoothing(0.1, 1e-2), chunk=10)
        return 0.37 * sums.loss, sums.nll

    eager, compiled = given.clone().requires_grad_(), given.clone().requires_grad_()
    want, got = loss(eager), torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    for one, other, hidden in zip(want, got, (eager, compiled), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        (want if hidden is eager else got)[0].backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(compiled.grad.abs().sum(-1) > 0, mask)


def test_plain_nll_is_torchs_cross_entropy_and_is_not_smoothed():
    hidden, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    targets, mask = torch.arange(9), torch.ones(9, dtype=torch.bool)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    smooth = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", label_smoothing=0.3)
    sums = linear_cross_entropy(hidden, Head(weight), targets, mask, Smoothing(0.3), chunk=4)
    torch.testing.assert_close(sums.nll, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums.loss, smooth, rtol=1e-12, atol=0)
    assert (sums.loss - sums.nll).abs() > 1e-3


def test_under_autocast_products_are_bfloat16_and_sums_float32():
    with torch.autocast("cpu", torch.bfloat16):
        narrow = _run(linear_cross_entropy, torch.float32, chunk=20)
    wide = _run(linear_cross_entropy, torch.float32, chunk=20)
    assert narrow[0].dtype == torch.float32
    assert narrow[3].dtype == torch.float32
    torch.testing.assert_close(narrow[0], wide[0], rtol=5e-3, atol=0)
    assert not torch.equal(narrow[0], wide[0])


def test_without_gradients_nothing_is_kept():
    hidden, weight = torch.randn(5, 3), torch.randn(7, 3, requires_grad=True)
    targets, mask = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.bool)
    with torch.no_grad():
        sums: Sums = linear_cross_entropy(hidden, Head(weight), targets, mask)
    assert not sums.loss.requires_grad
    assert linear_cross_entropy(hidden, Head(weight), targets, mask).loss.requires_grad
