"""Scoring, and with it the check that what was decoded token by token is what one pass would say."""

import math

import pytest
import torch
from engine_cases import SPECS, llama, memory_for, model_of, prompts, random_ids, requests_for, together

from weft.engine import Request, SamplingParams, score
from weft.errors import UserError


@pytest.mark.parametrize("name", SPECS)
def test_rescoring_finds_every_greedy_token_the_likeliest(name):
    model, requests = model_of(name), requests_for(name)
    results = together(model, requests)
    memories = None if requests[0].memory is None else [request.memory for request in requests]
    texts = [[*request.prompt, *result.ids] for request, result in zip(requests, results, strict=True)]
    for request, result, found in zip(requests, results, score(model, texts, chunk=5, rows=3, memories=memories), strict=True):
        start = len(request.prompt) - 1
        reported = [token.logprob for token in result.logprobs]
        assert found.logprobs[start:] == pytest.approx(reported, abs=1e-9)
        if request.params.greedy:
            assert max(found.margins[start:]) < 1e-9
            assert found.best[start:] == result.ids


def test_another_token_is_found_not_to_be_the_likeliest():
    model = llama()
    result = together(model, [Request([1, 2, 3], SamplingParams(max_tokens=6))])[0]
    changed = [1, 2, 3, *result.ids[:3], (result.ids[3] + 1) % 97]
    assert score(model, [changed])[0].margins[-1] > 1e-6


def test_scores_equal_one_parallel_pass():
    model = llama()
    texts = [text for text in prompts(97) if len(text) > 1]
    for text, found in zip(texts, score(model, texts, chunk=4, rows=2), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([text])).logits[0].log_softmax(-1)
        want = [logprobs[place, token].item() for place, token in enumerate(text[1:])]
        assert found.logprobs == pytest.approx(want, abs=1e-10)
        assert found.total == pytest.approx(math.fsum(want), abs=1e-9)
        assert found.perplexity == pytest.approx(math.exp(-math.fsum(want) / len(want)), rel=1e-10)
        assert found.best == tuple(logprobs.argmax(-1)[:-1].tolist())


def test_what_cannot_be_scored_is_refused():
    model = llama(context=32)
    with pytest.raises(UserError, match="text 1 has 33 tokens"):
        score(model, [[1], random_ids(33, 0, 97)])
    with pytest.raises(UserError, match="text 0 has 0 tokens"):
        score(model, [[]])
    with pytest.raises(UserError, match="nothing to predict"):
        _ = score(model, [[5]])[0].perplexity
    with pytest.raises(UserError, match="none was given"):
        score(model_of("cross"), [[1, 2]])
    assert memory_for("cross", 0) is not None
