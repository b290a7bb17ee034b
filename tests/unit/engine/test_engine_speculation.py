"""Drafts: greedy text stays as it is, samples keep their distribution, and drafting stops where it does not pay."""

import random
from collections import Counter

import pytest
import torch
from engine_cases import CHUNK, drift, llama, llama_spec, memory_for, mixed_params, model_of, prompts, random_ids
from test_engine_scheduling import NOTHING, leaks

from weft.engine import Engine, Request, SamplingParams
from weft.engine.draft import Draft, ModelDrafter, NgramDrafter
from weft.engine.random import uniform
from weft.engine.speculation import DraftLength, FixedLength, Speculation, accept
from weft.errors import UserError
from weft.nn import Arena, build

PAGE = 4
TOLERANCE = 1e-10


class Guesser:
    """Knows the right texts and errs at random, so that drafts stand in part."""

    def __init__(self, right, wrong=0.3):
        self.right, self.wrong, self.rng = right, wrong, random.Random(0)
        self.accepted = []

    def propose(self, texts, most):
        drafts = []
        for text, count in zip(texts, most, strict=True):
            ids = self.right.get((text.task.prompt, text.index), ())[len(text.ids) : len(text.ids) + self.rng.randint(0, count)]
            drafts.append(Draft([3 if self.rng.random() < self.wrong else token for token in ids]))
        return drafts

    def check(self, model):
        pass

    def observe(self, text, accepted):
        self.accepted.append(accepted)

    def release(self, text):
        pass


def with_drafts(model, drafter, rows=3, most=5, pages=None, **options):
    engine = Engine(model, rows=rows, chunk=CHUNK, page=PAGE, draft=Speculation(drafter, FixedLength(most)), **options)
    if pages:
        engine._lanes.max_pages = pages
        engine._lanes.arena.allow_pages(pages, pages)
    return engine


def mixed_requests(name, dtype=torch.float64):
    """Greedy ones with and without logit bias, samples under penalties (which go without drafts), several samples and beams."""
    requests = []
    for number, prompt in enumerate(prompts()):
        params = mixed_params(number, top_logprobs=2 if number % 2 == 0 else 0)
        if number == 2:
            params = SamplingParams(max_tokens=20, logit_bias={4: 1.5, 7: -2.0}, logprobs=True)
        if number == 4:
            params = SamplingParams(max_tokens=7, beams=2, n=2, logprobs=True)
        requests.append(Request(prompt, params, memory_for(name, number, dtype)))
    requests.append(Request(random_ids(6, 9), SamplingParams(max_tokens=25, n=2, logprobs=True), memory_for(name, 1, dtype)))
    return requests


def right_texts(requests, results):
    return {(tuple(requests[result.request].prompt), result.index): result.ids for result in results}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["gqa", "window", "lstm", "mamba", "hybrid", "everything"])
def test_greedy_text_is_the_same_with_drafts(name, dtype):
    model, requests = model_of(name, dtype), mixed_requests(name, dtype)
    right = Engine(model, rows=3, chunk=CHUNK).generate(requests)
    guesser = Guesser(right_texts(requests, right))
    engine = with_drafts(model, guesser)
    ours = engine.generate(requests)
    assert drift(ours, right) <= (TOLERANCE if dtype == torch.float64 else 0)
    assert leaks(engine) == NOTHING
    stats = engine.stats
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.generated_tokens == sum(len(result.ids) for result in right if result.score is None) + 7
    assert len(set(guesser.accepted)) > 2, "drafts stood whole, in part and not at all"


@pytest.mark.parametrize("name", ["gqa", "window", "hybrid"])
def test_a_state_that_is_one_token_off_after_a_draft_is_noticed(name, monkeypatch):
    model, requests = model_of(name), mixed_requests(name)
    right = Engine(model, rows=3, chunk=CHUNK).generate(requests)
    commit = Arena.commit

    def careless(arena, pending, accepted, rows=None):
        commit(arena, pending, accepted - (accepted > 1).long(), rows)

    monkeypatch.setattr(Arena, "commit", careless)
    engine = with_drafts(model, Guesser(right_texts(requests, right)), cache=False)
    monkeypatch.setattr(engine._lanes, "next_count", lambda lane: 1)  # prompts go token by token, so that drafts alone are damaged
    assert drift(engine.generate(requests), right) > 1000 * TOLERANCE


@pytest.mark.parametrize("name", ["gqa", "window", "hybrid"])
@pytest.mark.parametrize("drafting", ["ngram", "itself", "lstm", "hybrid"])
def test_drafters_change_no_greedy_text(name, drafting):
    model, requests = model_of(name), mixed_requests(name)
    right = Engine(model, rows=3, chunk=CHUNK).generate(requests)
    smaller = model if drafting == "itself" else model_of("lstm" if drafting == "lstm" else "hybrid")
    drafter = NgramDrafter() if drafting == "ngram" else ModelDrafter(smaller, rows=2, chunk=5)
    engine = with_drafts(model, drafter)
    assert drift(engine.generate(requests), right) < TOLERANCE
    stats = engine.stats
    assert stats.drafted_tokens > 0
    if drafting == "itself":
        assert stats.accepted_tokens == stats.drafted_tokens, "who drafts with the model itself is always right"
    if drafting != "ngram":
        assert leaks_of_drafter(drafter) == NOTHING
        assert not drafter._held
    else:
        assert not drafter._indices


def leaks_of_drafter(drafter):
    class Holder:
        _lanes = drafter._lanes

    return leaks(Holder)


def test_drafts_with_preemption_and_little_room():
    model = llama()
    requests = [Request(random_ids(20, n, 97), SamplingParams(max_tokens=30, logprobs=True)) for n in range(5)]
    right = Engine(model, cache=False).generate(requests)
    engine = with_drafts(model, Guesser(right_texts(requests, right), 0.1), rows=5, pages=24)
    assert drift(engine.generate(requests), right) < TOLERANCE
    assert engine.stats.preemptions > 0
    assert engine.stats.accepted_tokens > 0
    small = ModelDrafter(model, rows=5, memory=16 * PAGE * model.spec.state_bytes(1, 8) * 8)
    small._lanes.arena.allow_pages(1, 1)
    engine = with_drafts(model, small, rows=5)
    assert drift(engine.generate(requests), right) < TOLERANCE
    assert leaks_of_drafter(small) == NOTHING


def test_samples_of_a_prompt_of_one_token_all_come():
    """Their prompt is over in the pass that decodes, where a draft would run ahead of those who are to begin there."""
    params = SamplingParams(max_tokens=6, n=3, logprobs=True)
    right = Engine(llama()).generate([Request([7], params)])
    engine = with_drafts(llama(), Guesser({((7,), 0): right[0].ids}, 0.0))
    assert drift(engine.generate([Request([7], params)]), right) < TOLERANCE
    assert engine.stats.waiting == 0
    assert engine.stats.accepted_tokens > 0


def test_drafts_end_where_the_text_ends():
    model = llama(context=32)
    whole = Engine(model).generate([Request([5, 6, 7], SamplingParams())])[0]
    assert len(whole.ids) == 29
    at = next(place for place in range(9, 29) if whole.ids[place] not in whole.ids[:place])
    for params in (SamplingParams(), SamplingParams(max_tokens=4), SamplingParams(max_tokens=1), SamplingParams(stop_ids=(whole.ids[at],))):
        right = Engine(model).generate([Request([5, 6, 7], params)])[0]
        engine = with_drafts(model, Guesser({((5, 6, 7), 0): whole.ids}, 0.0))
        assert engine.generate([Request([5, 6, 7], params)])[0] == right
        assert leaks(engine) == NOTHING


def test_what_followed_last_time_is_the_draft():
    class Text:
        def __init__(self, prompt):
            self.task, self.ids = self, []
            self.prompt = prompt

    drafter, text = NgramDrafter(), Text((1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3))
    assert drafter.propose([text], [4])[0].ids == [5, 8, 2, 3], "the latest (2, 3)"
    text.ids += [4]
    assert drafter.propose([text], [2])[0].ids == [9, 2], "the longest match, (2, 3, 4), before the latest"
    text.ids += [7]
    assert drafter.propose([text], [3])[0].ids == []
    text.ids += [7]
    assert drafter.propose([text], [3])[0].ids == [7]
    drafter.release(text)
    assert not drafter._indices


def test_a_draft_model_of_another_vocabulary_is_refused():
    with pytest.raises(UserError, match="the draft model has 31 tokens in its vocabulary and the model 97"):
        Engine(llama(), draft=ModelDrafter(model_of("gqa")))


# sampling


def chi_square(counts, probs, total):
    """Pearson's statistic over its degrees of freedom: about 1 where counts are drawn from probs."""
    expected = [float(p) * total for p in probs]
    return sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected) if e > 0) / (sum(e > 0 for e in expected) - 1)


@pytest.mark.parametrize("drafting", ["model", "point"])
def test_the_rule_keeps_the_distribution(drafting):
    """Over many seeds: the first token after drafting, and the second where the first draft stood, against their exact distributions."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 6, generator=generator, dtype=torch.float64).softmax(-1) ** 3
    target[:, 5] = 0.0
    target /= target.sum(-1, keepdim=True)
    q = torch.rand(2, 6, generator=generator, dtype=torch.float64).softmax(-1) ** 2
    q /= q.sum(-1, keepdim=True)
    total = 8_000
    first, second, wrong = Counter(), Counter(), Counter()
    for seed in range(total):
        if drafting == "model":
            ids = [int(torch.searchsorted(q[i].cumsum(0), uniform(seed, 9, i))) for i in range(2)]
            draft = Draft(ids, [q[0], q[1]])
        else:
            draft = Draft([1, 2])
        verdict = accept(target, draft, [uniform(seed, 0, i, 1) for i in range(2)], [uniform(seed, 0, i) for i in range(3)])
        tokens = [*draft.ids[: verdict.accepted], verdict.token]
        first[tokens[0]] += 1
        if len(tokens) > 1:
            second[tokens[1]] += 1
        careless = accept(target, Draft(draft.ids), [0.999 * p for p in (0.5, 0.5)], [uniform(seed, 0, i) for i in range(3)])
        wrong[[*draft.ids[: careless.accepted], careless.token][0]] += 1
    assert chi_square(first, target[0], total) < 2.5
    assert first[5] == second[5] == 0
    assert chi_square(second, target[1], sum(second.values())) < 2.5
    assert chi_square(wrong, target[0], total) > 15, "control: numbers that are not uniform"


def test_sampled_texts_keep_their_distribution():
    """Pairs of tokens of a tiny model, with filters, drafted by another tiny model, against the product of exact probabilities."""
    spec = llama_spec(vocab=5, context=32)
    model, other = build(spec, dtype=torch.float64, seed=3).eval(), build(spec, dtype=torch.float64, seed=4).eval()
    settings = {"temperature": 0.8, "top_k": 4, "max_tokens": 3}
    for drafter in (ModelDrafter(other), NgramDrafter()):
        engine = with_drafts(model, drafter, rows=16, most=2)
        total = 1500
        results = engine.generate([Request([1, 2, 3, 1, 2, 3], SamplingParams(seed=seed, **settings)) for seed in range(total)])
        counts = Counter(result.ids[0] * 5 + result.ids[1] for result in results)
        exact = pair_probabilities(model, [1, 2, 3, 1, 2, 3], 0.8, 4)
        assert chi_square(counts, exact, total) < 2.0
        assert 0 < engine.stats.accepted_tokens < engine.stats.drafted_tokens
        assert chi_square(counts, pair_probabilities(other, [1, 2, 3, 1, 2, 3], 0.8, 4), total) > 10, "control: the draft model's own"


def pair_probabilities(model, prompt, temperature, top_k):
    def following(ids):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1] / temperature
        return logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf).softmax(-1)

    first = following(prompt)
    return [float(first[a] * following([*prompt, a])[b]) for a in range(5) for b in range(5)]


# whether it pays


def simulate(length, share, cost, passes=400):
    """Passes of a machine where a drafted token costs `cost` of a plain pass and stands with probability `share`; tokens a second."""
    rng = random.Random(0)
    tokens, seconds, drafted = 0, 0.0, 0
    for _ in range(passes):
        count = length.choose(1)
        accepted = 0
        while accepted < count and rng.random() < share:
            accepted += 1
        spent = 1 + cost * count
        length.observe(1, count, spent, count, accepted)
        tokens, seconds, drafted = tokens + 1 + accepted, seconds + spent, drafted + count
    return tokens / seconds, drafted


def test_drafting_pays_where_tokens_stand_and_stops_where_they_do_not():
    fast, drafted = simulate(DraftLength(), 0.8, 0.1)
    assert fast > 1.8
    assert drafted > 400
    slow, drafted = simulate(DraftLength(), 0.05, 0.5)
    assert slow > 0.9, "little is lost"
    assert 0 < drafted < 120, "but it is tried again now and then"
    assert simulate(FixedLength(8), 0.05, 0.5)[0] < 0.3, "control: always drafting would cost three times as much"


def test_drafting_begins_again_where_it_comes_to_pay():
    length = DraftLength()
    simulate(length, 0.05, 0.5)
    assert simulate(length, 0.9, 0.05, 3000)[0] > 2


def test_the_engine_learns_from_its_own_passes():
    model = llama()
    text = random_ids(12, 1, 97) * 6
    engine = Engine(model, draft=NgramDrafter())
    right = Engine(model).generate([Request(text, SamplingParams(max_tokens=40, logprobs=True))])
    assert drift(engine.generate([Request(text, SamplingParams(max_tokens=40, logprobs=True))]), right) < TOLERANCE
    assert (1, 0) in engine._speculation.length._seconds
