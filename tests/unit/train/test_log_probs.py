"""Chunked log-probabilities and divergences against their naive twins, with gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weft.objectives.cross_entropy import linear_cross_entropy
from weft.objectives.divergence import Divergence, Side, linear_divergence, naive_divergence
from weft.objectives.head import Head
from weft.objectives.log_probs import linear_log_probs, naive_log_probs, token_log_probs

TOKENS, DIM, IDS = 77, 12, 53


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(bias: bool, softcap: float | None, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Head, torch.Tensor]:
    """Hidden states, a head and targets; what can have a gradient asks for one."""
    hidden, weight = (drawn(seed, *shape, dtype=dtype).requires_grad_() for seed, shape in ((0, (TOKENS, DIM)), (1, (IDS, DIM))))
    offset = drawn(2, IDS, dtype=dtype).requires_grad_() if bias else None
    return hidden, Head(weight, offset, softcap), torch.randint(IDS, (TOKENS,), generator=torch.Generator().manual_seed(3))


def results(compute, bias=True, softcap=None, dtype=torch.float64, **more) -> list[torch.Tensor]:
    hidden, head, targets = case(bias, softcap, dtype)
    found = compute(hidden, head, targets, **more)
    outer = drawn(4, TOKENS, dtype=dtype)  # every token weighs something else
    (found.log_probs * outer).sum().backward()
    grown = [hidden.grad, head.weight.grad] + ([head.bias.grad] if head.bias is not None else [])
    return [found.log_probs.detach(), *grown, *([found.entropy] if found.entropy is not None else [])]


@pytest.mark.parametrize("chunk", [1, 10, 77, 1000])
@pytest.mark.parametrize(("temperature", "softcap", "bias"), [(1.0, None, False), (0.7, None, True), (1.0, 5.0, False), (1.6, 3.0, True)])
def test_log_probs_and_their_gradients_equal_the_naive_ones(chunk, temperature, softcap, bias):
    naive = results(naive_log_probs, bias, softcap, temperature=temperature)
    chunked = results(linear_log_probs, bias, softcap, temperature=temperature, entropy=True, chunk=chunk)
    for expected, found in zip(naive, chunked, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Negative control: temperature and soft cap matter, to values and to gradients.
    other = results(linear_log_probs, bias, None if softcap else 4.0, temperature=temperature * 1.01, entropy=True, chunk=chunk)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(naive, other, strict=True))


def test_summed_they_are_the_cross_entropy():
    hidden, head, targets = case(True, None)
    values = linear_log_probs(hidden, head, targets).log_probs
    sums = linear_cross_entropy(hidden, head, targets, torch.ones(TOKENS))
    torch.testing.assert_close(-values.sum(), sums.loss, rtol=1e-12, atol=0)
    assert (-linear_log_probs(hidden, head, targets.roll(1)).log_probs.sum() - sums.loss).abs() > 1


class Products(TorchDispatchMode):
    """The shapes of all matrix products that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.add(tuple(matrix.shape for matrix in args[-2:]))
        return func(*args, **(kwargs or {}))


def _divergence(hidden, head, targets):
    return linear_divergence(Side(hidden, head), Side(hidden.detach(), head), torch.ones(len(hidden)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda hidden, head, targets: linear_cross_entropy(hidden, head, targets, torch.ones(len(hidden))).loss,
        lambda hidden, head, targets: linear_log_probs(hidden, head, targets).log_probs.sum(),
        _divergence,
    ],
)
def test_few_shapes_are_multiplied_however_many_tokens_there_are(loss):
    hidden, head, targets = case(True, None)

    def shapes(tokens: int) -> set[tuple[torch.Size, ...]]:
        with Products() as products:
            loss(hidden[:tokens], head, targets[:tokens]).backward()
        return products.shapes

    assert len(shapes(5)) == 3  # logits, and the gradients of both that made them
    assert shapes(5) == shapes(32) != shapes(33) == shapes(64)


def test_logits_far_from_zero_lose_nothing():
    hidden, weight = drawn(5, 9, 4) * 300, drawn(6, 11, 4) * 300
    naive, chunked = (compute(hidden, Head(weight), torch.arange(9)) for compute in (naive_log_probs, linear_log_probs))
    assert torch.isfinite(chunked.log_probs).all()
    torch.testing.assert_close(chunked.log_probs, naive.log_probs, rtol=1e-12, atol=1e-12)


def test_a_token_without_a_target_gives_a_finite_number():
    hidden, weight = drawn(7, 2, 5, 4).requires_grad_(), drawn(8, 11, 4)
    targets = torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 7, -100]])
    found = token_log_probs(hidden, Head(weight), targets)
    assert found.log_probs.shape == targets.shape
    (found.log_probs * (targets >= 0)).sum().backward()
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, targets >= 0)


def test_under_autocast_products_are_bfloat16_and_sums_float32():
    with torch.autocast("cpu", torch.bfloat16):
        narrow = results(linear_log_probs, dtype=torch.float32, chunk=20)
    wide = results(linear_log_probs, dtype=torch.float32, chunk=20)
    assert all(value.dtype == torch.float32 for value in narrow)
    assert not torch.equal(narrow[0], wide[0])
    torch.testing.assert_close(narrow[0], wide[0], rtol=0, atol=0.1)


def test_without_gradients_the_values_are_the_same():
    hidden, head, targets = case(True, 4.0)
    with torch.no_grad():
        found = linear_log_probs(hidden, head, targets, chunk=10)
    assert not found.log_probs.requires_grad
    assert torch.equal(found.log_probs, linear_log_probs(hidden, head, targets, chunk=10).log_probs.detach())


def test_no_token_has_no_log_probability():
    hidden, weight = drawn(7, 0, 4).requires_grad_(), drawn(8, 11, 4).requires_grad_()
    found = linear_log_probs(hidden, Head(weight), torch.zeros(0, dtype=torch.long), entropy=True)
    assert found.log_probs.shape == found.entropy.shape == (0,)
    found.log_probs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def diverged(compute, divergence: Divergence, softcap: float | None = None, bias: bool = True, **more) -> list[torch.Tensor]:
    hidden, head, _ = case(bias, softcap)
    teacher = Side(drawn(9, TOKENS, 7), Head(drawn(10, IDS, 7), drawn(11, IDS), 6.0))
    mask = torch.rand(TOKENS, generator=torch.Generator().manual_seed(12)) > 0.4
    loss = compute(Side(hidden, head), teacher, mask, divergence, **more)
    (0.37 * loss).backward()
    return [loss.detach(), hidden.grad, head.weight.grad] + ([head.bias.grad] if head.bias is not None else [])


@pytest.mark.parametrize("chunk", [10, 1000])
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (3.0, True)])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergences_and_their_gradients_equal_the_naive_ones(kind, softcap, bias, chunk):
    divergence = Divergence(kind, 1.7, 0.3)
    naive = diverged(naive_divergence, divergence, softcap, bias)
    chunked = diverged(linear_divergence, divergence, softcap, bias, chunk=chunk)
    for expected, found in zip(naive, chunked, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # Negative control: the temperature, and which of the two the divergence is from, matter.
    for other in (Divergence(kind, 1.69, 0.3), Divergence({"forward": "reverse", "reverse": "jsd", "jsd": "forward"}[kind], 1.7, 0.3)):
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(naive, diverged(linear_divergence, other, softcap, bias), strict=True))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    hidden, head, _ = case(True, None)
    loss = linear_divergence(Side(hidden, head), Side(hidden.detach(), head), torch.ones(TOKENS), Divergence(kind))
    loss.backward()
    assert loss.abs() < 1e-12
    assert hidden.grad.abs().max() < 1e-12


def test_divergences_are_those_of_torch_s_distributions():
    """JSD by the paper's definition (Agarwal et al. 2024, equation 1), with beta as the teacher's share of the mixture."""
    student, teacher = (Side(drawn(seed, 19, 8), Head(drawn(seed + 1, 37, 8))) for seed in (20, 22))
    q, p = (torch.distributions.Categorical(logits=side.hidden @ side.head.weight.T / 1.7) for side in (student, teacher))
    m = torch.distributions.Categorical(probs=0.3 * p.probs + 0.7 * q.probs)
    kl = torch.distributions.kl_divergence
    expected = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m)}
    found = {kind: linear_divergence(student, teacher, torch.ones(19), Divergence(kind, 1.7, 0.3)) for kind in expected}
    for kind, value in expected.items():
        torch.testing.assert_close(found[kind], value.sum(), rtol=1e-10, atol=0)
    assert len({round(float(value), 3) for value in found.values()}) == 3


def test_a_divergence_worked_by_hand():
    """Two ids, p = (3/4, 1/4), q = (1/2, 1/2): KL(p, q) = 3/4 ln 3 - ln 2, KL(q, p) = ln 2 - (ln 3) / 2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    log = torch.log(torch.tensor(3.0, dtype=torch.float64))
    student, teacher = (Side(one, Head(torch.stack([value.view(1), torch.zeros(1, dtype=torch.float64)]))) for value in (0 * log, log))
    forward, reverse = (linear_divergence(student, teacher, torch.ones(1), Divergence(kind)) for kind in ("forward", "reverse"))
    assert abs(float(forward) - 0.75 * 1.0986122886681098 + 0.6931471805599453) < 1e-12
    assert abs(float(reverse) - 0.6931471805599453 + 1.0986122886681098 / 2) < 1e-12


def test_a_compiled_step_gives_the_same():
    hidden, head, targets = case(True, 4.0)
    mask = torch.ones(TOKENS)

    def both(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ours = Head(weight, head.bias, 4.0)
        lesson = Side(hidden.detach() * 2, Head(weight.detach()))
        return (linear_log_probs(hidden, ours, targets, chunk=40).log_probs * mask).sum() + linear_divergence(
            Side(hidden, ours), lesson, mask, Divergence("jsd"), chunk=40
        )

    grown = []
    for compute in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        hidden.grad = head.weight.grad = None
        compute(hidden, head.weight).backward()
        grown.append((hidden.grad, head.weight.grad))
    for expected, found in zip(*grown, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
