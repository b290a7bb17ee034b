"""The prefix cache: what was read before is not computed again, and gives what computing it gives."""

import pytest
import torch
from engine_cases import CHUNK, drift, llama, memory_for, model_of, random_ids

from weft.engine import Engine, Request, SamplingParams
from weft.engine.prefix import PrefixCache, numeric_mode
from weft.nn import build

PAGE = 4
TOLERANCE = 1e-10
GREEDY = SamplingParams(max_tokens=8, logprobs=True)


def make(model, **options):
    return Engine(model, rows=3, chunk=CHUNK, page=PAGE, **options)


def cached(engine, request):
    """Run a request; how many of its tokens the cache had, and its results."""
    before = engine.stats.cached_prompt_tokens
    results = engine.generate([request])
    return engine.stats.cached_prompt_tokens - before, results


@pytest.mark.parametrize("name", ["gqa", "window", "mamba", "lstm", "hybrid", "rwkv_channel_mix", "cross"])
def test_a_conversation_computes_what_is_new(name):
    model, memory = model_of(name), memory_for(name, 1)
    engine, text, before = make(model), random_ids(14, 4), 0
    for turn in range(4):
        request = Request(list(text), GREEDY, memory)
        found, ours = cached(engine, request)
        assert drift(ours, make(model, cache=False).generate([request])) < TOLERANCE
        # All full pages of what the last turn fed: its prompt and its text without the last token.
        assert found == (0 if name == "cross" or turn == 0 else (before - 1) // PAGE * PAGE)
        before = len(text) + 8
        text += [*ours[0].ids, *random_ids(3, 50 + turn)]


@pytest.mark.parametrize("name", ["gqa", "window", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_where_a_cached_beginning_ends_does_not_matter(name, dtype):
    model, text = model_of(name, dtype), random_ids(33, 5)
    request = Request(text, GREEDY)
    right = make(model, cache=False).generate([request])
    for length in (4, 9, 13, 24, 32, 33):
        engine = make(model)
        engine.generate([Request(text[:length], SamplingParams(max_tokens=1))])
        found, ours = cached(engine, request)
        assert found == min(length, 32) // PAGE * PAGE
        assert drift(ours, right) < (TOLERANCE if dtype == torch.float64 else 1e-300)


def test_float32_differs_at_near_ties_alone():
    model, text = model_of("hybrid", torch.float32), random_ids(33, 5)
    params = SamplingParams(max_tokens=8, logprobs=True, top_logprobs=2)
    right = make(model, cache=False).generate([Request(text, params)])[0]
    for length in (9, 24, 32):
        engine = make(model)
        engine.generate([Request(text[:length], SamplingParams(max_tokens=1))])
        ours = engine.generate([Request(text, params)])[0]
        differing = [place for place, pair in enumerate(zip(ours.ids, right.ids, strict=True)) if pair[0] != pair[1]]
        assert not differing or right.logprobs[differing[0]].top[0][1] - right.logprobs[differing[0]].top[1][1] < 1e-4


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token():
    model, text = llama(), random_ids(16, 6, 97)
    engine = make(model)
    first = engine.generate([Request(text, GREEDY)])
    found, again = cached(engine, Request(text, GREEDY))
    assert found == 12
    assert drift(first, again) < TOLERANCE


def test_a_request_shares_the_pages_of_one_that_runs():
    model, text = llama(), random_ids(24, 6, 97)
    engine = make(model)
    engine.submit(Request(text, SamplingParams(max_tokens=20)))
    for _ in range(6):
        engine.step()
    second = engine.submit(Request([*text, 3], SamplingParams(max_tokens=5)))
    engine.step()
    owned = engine._lanes.arena.pages.owned
    assert owned[0][:6] == owned[1][:6]
    assert max(engine._lanes.arena.pages.references) == 2
    assert engine.stats.cached_prompt_tokens == 24
    assert [result.request for result in engine.cancel(second)] == [second]


def test_the_least_recently_used_pages_go_first():
    model = llama()
    engine = make(model)
    engine._lanes.arena.allow_pages(20, 20)
    texts = [random_ids(24, n, 97) for n in range(3)]
    one = SamplingParams(max_tokens=1)
    for text in (texts[0], texts[1], texts[0], texts[2], texts[2]):
        engine.generate([Request(text, one)])
    found = [len(engine._lanes.find(text, []).pages) for text in texts]
    assert found[0] == found[2] == 5, "all but the page of the last token"
    big = Request(random_ids(40, 9, 97), SamplingParams(max_tokens=1, logprobs=True))
    found, ours = cached(engine, big)
    assert found == 0
    assert drift(ours, make(model).generate([big])) == 0
    assert len(engine._lanes.find(texts[1], []).pages) < 5


def test_the_key_names_tokens_their_past_and_the_numbers():
    model, text = llama(), random_ids(13, 1, 97)
    engine = make(model)
    engine.generate([Request(text, GREEDY)])
    assert engine._lanes.find(text, []).length == 12
    assert engine._lanes.find([text[0] ^ 1, *text[1:]], []).length == 0, "equal blocks after another beginning are not equal"
    assert engine._lanes.find([*text[:11], 96 - text[11], text[12]], []).length == 8
    wide, narrow = llama(), llama(dtype=torch.bfloat16)
    modes = {numeric_mode(model, make(model)._lanes.arena) for model in (wide, narrow)}
    assert len(modes) == 2
    chains = [[], []]
    for mode, chain in zip(sorted(modes), chains, strict=True):
        PrefixCache(make(model)._lanes.arena, PAGE, mode, 0).extend(chain, text)
    assert not set(chains[0]) & set(chains[1])


def test_a_cache_that_mixes_up_its_blocks_is_noticed(monkeypatch):
    model = llama()
    engine = make(model)
    first, second = random_ids(20, 1, 97), random_ids(20, 2, 97)
    engine.generate([Request(first, GREEDY)])
    right = make(model).generate([Request(second, GREEDY)])
    monkeypatch.setattr(PrefixCache, "find", lambda cache, ids, chain, adapter, find=PrefixCache.find: find(cache, first, []))
    assert drift(engine.generate([Request(second, GREEDY)]), right) > 1000 * TOLERANCE


def test_snapshots_are_bounded_and_counted():
    model = model_of("hybrid")
    engine = make(model, memory=120_000)
    limit = engine._lanes.cache._snapshot_limit
    for seed in range(12):
        engine.generate([Request(random_ids(30, seed), GREEDY)])
        assert engine._lanes.cache.snapshot_bytes <= limit
    held = engine._lanes.cache._snapshots
    assert 1 < len(held) < 24
    assert (
        engine.stats.state_bytes_used
        == engine._lanes.cache.snapshot_bytes
        == sum(value.numel() * value.element_size() for copy in held.values() for value in copy.values())
    )


def test_changed_weights_need_a_cleared_cache():
    model = build(llama().spec, dtype=torch.float64, seed=1)
    engine, request = make(model), Request(random_ids(20, 1, 97), GREEDY)
    engine.generate([request])
    with torch.no_grad():
        model.embed.weight.mul_(1.5)
    right = make(model).generate([request])
    assert drift(engine.generate([request]), right) > 1000 * TOLERANCE, "control: old state, new weights"
    engine.clear_cache()
    assert drift(engine.generate([request]), right) < TOLERANCE
    assert engine._lanes.arena.pages.num_available == engine._lanes.arena.num_pages - 2
