"""Choosing tokens: ties, draws, streams of random numbers."""

import itertools
import math

import pytest
import torch

from weft.engine import filters
from weft.engine.random import uniform
from weft.engine.request import SamplingParams
from weft.engine.sampler import History, Sampler, likeliest, token_logprobs

VOCAB = 29
EMPTY = History([], [])


def sampler(*params, logits):
    return Sampler(params, [EMPTY] * len(params), logits)


def test_greedy_ties_go_to_the_lowest_id():
    logits = torch.zeros(3, VOCAB, dtype=torch.bfloat16)
    logits[0, [20, 7, 9]] = 2.0
    logits[1, [28, 27]] = 1.0
    params = [SamplingParams()] * 3
    assert sampler(*params, logits=logits).sample(logits, [0.9] * 3).tolist() == [7, 27, 0]


def test_a_greedy_row_beside_sampled_ones_stays_greedy():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(), SamplingParams(temperature=5.0, seed=1), SamplingParams(), SamplingParams(temperature=5.0, seed=2)]
    mixed = sampler(*params, logits=logits)
    seen = {tuple(mixed.sample(logits, [k / 7] * 4).tolist()) for k in range(7)}
    best = logits.argmax(-1).tolist()
    assert {ids[0] for ids in seen} == {best[0]}
    assert {ids[2] for ids in seen} == {best[2]}
    assert len({ids[1] for ids in seen}) > 3
    probs = mixed.distribution(logits)
    assert probs[0].tolist() == [float(token == best[0]) for token in range(VOCAB)]


def test_a_draw_inverts_the_cumulative_distribution():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    points = [0.0, 0.2, 0.25, 0.5, 0.7499, 0.75, 1 - 2**-40]
    drawn = [filters.draw(probs, torch.tensor([point], dtype=torch.float64)).item() for point in points]
    assert drawn == [1, 1, 3, 3, 3, 4, 4]


def test_draws_follow_the_distribution():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=0.8, top_k=9)
    one = sampler(params, logits=logits)
    count = 4000
    many = sampler(*[params] * count, logits=logits)
    ids = many.sample(logits.expand(count, -1), [uniform(11, 0, place) for place in range(count)])
    expected = one.distribution(logits)[0] * count
    observed = ids.bincount(minlength=VOCAB)
    alive = expected > 0
    assert observed[~alive].sum() == 0
    chi_square = ((observed - expected)[alive].square() / expected[alive]).sum().item()
    assert chi_square < 30, "8 degrees of freedom: beyond 30 once in 5000 seeds"
    skewed = ((observed.roll(1) - expected)[alive].square() / expected[alive]).sum().item()
    assert skewed > 30, "control"


def test_random_numbers_are_functions_of_their_place():
    places = list(itertools.product((0, 1, 2**63 - 1), (0, 1, 5), range(40), (0, 1)))
    values = [uniform(*place) for place in places]
    assert values == [uniform(*place) for place in places]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    mean = math.fsum(values) / len(values)
    assert abs(mean - 0.5) < 4 / math.sqrt(12 * len(values))


def test_penalties_follow_what_is_generated():
    logits = torch.zeros(2, VOCAB)
    params = [SamplingParams(presence_penalty=1.0, repetition_penalty=1.5), SamplingParams(frequency_penalty=0.5)]
    logits[:, 3] = 4.0
    watched = Sampler(params, [History([3], []), History([3], [])], logits)
    first = watched.penalise(logits)
    assert first[0, 3].item() == pytest.approx(4 / 1.5)
    assert first[1, 3].item() == 4.0, "frequency counts what was generated, not the prompt"
    for times in (1, 2):
        watched.observe(torch.tensor([3, 3]))
        now = watched.penalise(logits)
        assert now[0, 3].item() == pytest.approx(4 / 1.5 - 1.0)
        assert now[1, 3].item() == pytest.approx(4.0 - 0.5 * times)
    remade = Sampler(params, [History([3], [3, 3])] * 2, logits)
    assert torch.equal(remade.penalise(logits), now)


def test_log_probabilities_are_the_models_own():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits[1, [4, 8]] = 9.0
    reports = token_logprobs(logits, [2, 8, 0], [0, 3, 1])
    want = logits.log_softmax(-1)
    for row, report in enumerate(reports):
        assert report.logprob == pytest.approx(want[row, report.id].item(), abs=1e-12)
    assert reports[0].top == ()
    assert [token for token, _ in reports[1].top][:2] == [4, 8]
    assert reports[2].top[0][0] == want[2].argmax().item()


@pytest.mark.parametrize("vocab", [5, 4095, 4096, 5000, 50257])
def test_the_likeliest_is_the_first_of_the_largest(vocab):
    logits = torch.randint(0, 200, (7, vocab), generator=torch.Generator().manual_seed(vocab)).float()  # many ties
    logits[3, vocab - 2 :] = 500.0
    logits[4] = 1.0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        peak, index = likeliest(logits.to(dtype))
        assert torch.equal(peak.float(), logits.to(dtype).float().amax(-1))
        assert torch.equal(index, logits.to(dtype).float().argmax(-1))
    for place in (0, vocab // 2, vocab - 1):
        damaged = logits.clone()
        damaged[:, place] = torch.nan
        assert likeliest(damaged)[0].isnan().all()
