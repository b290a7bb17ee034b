"""Each filter against its definition, token by token, and against transformers' processors."""

import math

import pytest
import torch
from torch import Tensor

from weft.engine import filters
from weft.engine.request import SamplingParams
from weft.engine.sampler import History, Sampler

VOCAB = 53


def rows(seed: int = 0, count: int = 5, ties: bool = False, vocab: int = VOCAB) -> Tensor:
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits


def kept(logits: Tensor) -> list[set[int]]:
    return [set(torch.nonzero(row > -torch.inf)[:, 0].tolist()) for row in logits]


# naive twins: one row, one token at a time


def naive_top_k(row, k):
    if k == 0:
        return set(range(len(row)))
    least = sorted(row, reverse=True)[min(k, len(row)) - 1]
    return {i for i, value in enumerate(row) if value >= least}


def naive_probs(row):
    peak = max(row)
    weights = [math.exp(value - peak) for value in row]
    return [weight / math.fsum(weights) for weight in weights]


def naive_top_p(row, p):
    probs = naive_probs(row)
    total, least = 0.0, 0.0
    for prob in sorted(probs, reverse=True):
        if total >= p:
            break
        total, least = total + prob, prob
    return {i for i, prob in enumerate(probs) if prob >= least * (1 - 1e-6)}


def naive_min_p(row, p):
    probs = naive_probs(row)
    return {i for i, prob in enumerate(probs) if prob >= p * max(probs)}


@pytest.mark.parametrize("ties", [False, True])
def test_top_k_equals_its_twin(ties):
    logits, k = rows(ties=ties), torch.tensor([0, 1, 5, 52, 400])
    found = kept(filters.keep_top_k(logits, k))
    assert found == [naive_top_k(row.tolist(), n) for row, n in zip(logits, k.tolist(), strict=True)]
    assert found != [naive_top_k(row.tolist(), n) for row, n in zip(logits, [0, 2, 5, 52, 400], strict=True)], "control"


@pytest.mark.parametrize("ties", [False, True])
def test_top_p_equals_its_twin(ties):
    logits, p = rows(1, ties=ties).double(), torch.tensor([1.0, 1e-6, 0.3, 0.9, 0.999], dtype=torch.float64)
    found = kept(filters.keep_top_p(logits, p))
    assert found == [naive_top_p(row.tolist(), x) for row, x in zip(logits, p.tolist(), strict=True)]
    assert found != [naive_top_p(row.tolist(), x) for row, x in zip(logits, [1.0, 1e-6, 0.6, 0.9, 0.999], strict=True)], "control"


def test_a_nucleus_wider_than_the_guess_is_found():
    flat = torch.randn(2, 3 * filters.NUCLEUS_GUESSES[-1], generator=torch.Generator().manual_seed(0)).double() * 0.1
    p = torch.tensor([0.2, 0.9], dtype=torch.float64)
    found = kept(filters.keep_top_p(flat, p))
    assert found == [naive_top_p(row.tolist(), x) for row, x in zip(flat, p.tolist(), strict=True)]
    assert len(found[1]) > filters.NUCLEUS_GUESSES[-1] > len(found[0])
    assert kept(filters.keep_top_p(flat[:1], p[:1])) == found[:1], "a row's nucleus does not depend on a wider one beside it"


def test_min_p_equals_its_twin():
    logits, p = rows(2).double(), torch.tensor([0.0, 0.02, 0.3, 0.9, 1.0], dtype=torch.float64)
    found = kept(filters.keep_min_p(logits, p))
    assert found == [naive_min_p(row.tolist(), x) for row, x in zip(logits, p.tolist(), strict=True)]
    assert len(found[4]) == 1


def test_penalties_equal_their_definitions():
    logits, counts = rows(3), torch.randint(0, 3, (5, VOCAB), generator=torch.Generator().manual_seed(9))
    penalty, presence, frequency = (torch.tensor(values) for values in ([1.0, 1.3, 0.8, 2.0, 1.1], [0.5] * 5, [0.0, 0.1, 0.2, 0.3, -0.4]))
    repeated = filters.penalise_repeats(logits, counts > 0, penalty)
    counted = filters.penalise_counts(logits, counts, presence, frequency)
    for row in range(5):
        for token in range(VOCAB):
            value, count = logits[row, token].item(), counts[row, token].item()
            factor = penalty[row].item()
            want = value if not count else value / factor if value > 0 else value * factor
            assert repeated[row, token].item() == pytest.approx(want, abs=1e-6)
            want = value - (presence[row].item() if count else 0.0) - frequency[row].item() * count
            assert counted[row, token].item() == pytest.approx(want, abs=1e-5)


def test_no_temperature_overflows():
    logits = rows(4) * 100
    for temperature in (1e-30, 1e-3, 1.0, 1e6):
        probs = filters.heat(logits, torch.full((5,), temperature)).softmax(-1)
        assert torch.isfinite(probs).all()
    assert torch.equal(filters.heat(logits, torch.full((5,), 1e-30)).softmax(-1).argmax(-1), logits.argmax(-1))


# transformers as the oracle: the whole pipeline


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 1e30, 1e308])
def test_no_penalty_makes_what_is_no_number(penalty):
    logits = rows()
    logits[:, 3] = 0.0
    histories = [History((1, 2, 3, 7, 11), ()) for _ in logits]
    sampler = Sampler([SamplingParams(temperature=1.0, repetition_penalty=penalty)] * len(logits), histories, logits)
    assert sampler.distribution(logits).isfinite().all()
    assert (sampler.sample(logits, [0.999] * len(logits)) < VOCAB).all()


def test_distributions_equal_those_of_transformers():
    lp = pytest.importorskip("transformers.generation.logits_process")
    params = [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=7),
        SamplingParams(temperature=0.9, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.07),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
    ]
    logits = rows(5).double()
    histories = [History([1, 2, 3], [4, 4, 5]), History([7], []), History([9, 8], [7]), History([0], [1]), History([10, 11, 12], [20, 20])]
    ours = Sampler(params, histories, logits).distribution(logits)
    for row, (p, history) in enumerate(zip(params, histories, strict=True)):
        ids = torch.tensor([[*history.prompt, *history.generated]])
        steps = [lp.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)] if p.repetition_penalty != 1 else []
        steps += [lp.TemperatureLogitsWarper(p.temperature)]
        steps += [lp.TopKLogitsWarper(p.top_k)] if p.top_k else []
        steps += [lp.TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
        steps += [lp.MinPLogitsWarper(p.min_p)] if p.min_p else []
        theirs = logits[row : row + 1].clone()
        for step in steps:
            theirs = step(ids, theirs)
        torch.testing.assert_close(ours[row], theirs.softmax(-1)[0], rtol=0, atol=1e-12)
        assert (ours[row] - logits[row].softmax(-1)).abs().max() > 1e-3, "control: the filters did something"


@pytest.mark.parametrize("vocab", [7, 64, 200, 5001])
def test_draws_in_blocks_equal_draws_from_one_sum(vocab):
    generator = torch.Generator().manual_seed(vocab)
    probs = (torch.randn(400, vocab, generator=generator, dtype=torch.float64) * 3).softmax(-1)
    probs[torch.rand(probs.shape, generator=generator) < 0.5] = 0.0
    probs[:, -1] += 1e-3
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-40, 0.5], dtype=torch.float64)
    found = filters.draw(probs, uniforms)
    sums = probs.cumsum(-1)
    want = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)[:, 0]
    assert torch.equal(found, want)
    assert (probs.gather(1, found[:, None]) > 0).all()
    assert not torch.equal(filters.draw(probs, uniforms.flip(0)), want), "control"
