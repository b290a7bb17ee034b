"""Rows and pages shared by many requests: what each gets is what it would get alone, and nothing stays behind."""

import random
from dataclasses import replace

import pytest
import torch
from engine_cases import CHUNK, drift, llama, memory_for, mixed_params, model_of, random_ids, same_ids

from weft.engine import Engine, Request, SamplingParams
from weft.engine.budget import available_memory
from weft.engine.lanes import Lanes
from weft.errors import UserError
from weft.nn import Arena

PAGE = 4
TOLERANCE = 1e-10
GREEDY = SamplingParams(max_tokens=8, logprobs=True)


def small_engine(model, rows=4, pages=None, **options):
    """Pages of a few tokens, and no more of them than `pages`."""
    engine = Engine(model, rows=rows, chunk=CHUNK, page=PAGE, **options)
    if pages is not None:
        engine._lanes.max_pages = pages
        engine._lanes.arena.allow_pages(pages, pages)
    return engine


def leaks(engine):
    """What is still held when nothing runs: rows, references to pages, pages that are neither free nor cached."""
    table, lanes = engine._lanes.arena.pages, engine._lanes
    kept = set(lanes.cache._hashes)
    wrong = [page for page in table._idle if page not in kept or lanes.cache._pages[lanes.cache._hashes[page]] != page]
    used = [page for page, count in enumerate(table.references) if count]
    rows = [row for row, pages in enumerate(table.owned) if pages]
    return lanes.active, used, rows, wrong, table.num_used


NOTHING = ([], [], [], [], 0)


def workload(name, dtype=torch.float64, seed=0):
    """Requests whose prompts share beginnings of odd lengths, some with several samples, some with beams."""
    rng = random.Random(seed)
    base = random_ids(40, 7)
    requests = []
    for number in range(14):
        prompt = base[: rng.choice((0, 5, 16, 23, 31))] + random_ids(rng.randint(1, 9), 50 + number)
        params = replace(mixed_params(number), max_tokens=22)
        if number % 5 == 1:
            params = SamplingParams(max_tokens=7, temperature=1.0, seed=number, n=3, logprobs=True)
        if number % 5 == 3:
            params = SamplingParams(max_tokens=6, beams=3, n=2, logprobs=True)
        requests.append(Request(prompt, params, memory_for(name, number % 3, dtype)))
    return requests


def run_at_random(engine, requests, seed=0, cancelled=()):
    """Submit at random moments, cancel some on their way; the results of the others, in order."""
    rng = random.Random(seed)
    waiting, numbers, results = list(enumerate(requests)), {}, {}
    while waiting or engine.busy:
        while waiting and rng.random() < 0.8:
            at, request = waiting.pop(0)
            numbers[engine.submit(request)] = at
        for event in engine.step():
            if event.result is not None:
                results[numbers[event.request], event.result.index] = event.result
        for number, at in list(numbers.items()):
            if at in cancelled and rng.random() < 0.2:
                engine.cancel(number)
    return [result for key, result in sorted(results.items()) if key[0] not in cancelled]


def solo(model, requests, skipped=()):
    """Each request in an engine of its own, without a cache."""
    kept = [request for at, request in enumerate(requests) if at not in skipped]
    return [result for request in kept for result in Engine(model, rows=4, chunk=CHUNK, cache=False).generate([request])]


@pytest.mark.parametrize("name", ["gqa", "window", "mamba", "lstm", "hybrid", "everything"])
def test_arrivals_cancellations_preemptions_and_shared_beginnings_change_nothing(name):
    model, requests, cancelled = model_of(name), workload(name), (2, 6, 8)
    engine = small_engine(model, rows=8, pages=36)
    assert drift(run_at_random(engine, requests, 1, cancelled), solo(model, requests, cancelled)) < TOLERANCE
    assert leaks(engine) == NOTHING
    stats = engine.stats
    assert (stats.waiting, stats.running) == (0, 0)
    assert stats.preemptions > 0
    assert (stats.cached_prompt_tokens > 0) == (name != "everything")


@pytest.mark.parametrize("name", ["gqa", "window", "mamba", "hybrid"])
def test_the_same_in_bfloat16_token_for_token(name):
    model, requests = model_of(name, torch.bfloat16), workload(name, torch.bfloat16)
    engine = small_engine(model, rows=8, pages=36)
    assert drift(run_at_random(engine, requests, 2), solo(model, requests)) == 0
    assert leaks(engine) == NOTHING


def test_a_preempted_request_whose_state_is_not_computed_again_is_noticed(monkeypatch):
    model, requests = llama(), [Request(random_ids(20, n, 97), SamplingParams(max_tokens=20, logprobs=True)) for n in range(4)]
    right = solo(model, requests)
    engine = small_engine(model, pages=24)
    assert drift(engine.generate(requests), right) < TOLERANCE
    assert engine.stats.preemptions > 0
    take = Lanes.take

    def hasty(lanes, owner, ids, *others):
        lane = take(lanes, owner, ids, *others)
        if owner.ids:
            lane.fed = lanes.arena.lens[lane.row] = len(ids) - 1
        return lane

    monkeypatch.setattr(Lanes, "take", hasty)
    assert drift(small_engine(model, pages=24).generate(requests), right) > 1000 * TOLERANCE


def test_the_request_that_came_last_gives_way():
    model = llama()
    engine = small_engine(model, pages=24)
    numbers = [engine.submit(Request(random_ids(20, n, 97), SamplingParams(max_tokens=30))) for n in range(3)]
    ended = []
    while engine.busy:
        ended += [event.request for event in engine.step() if event.result]
    assert ended == numbers
    assert engine.stats.preemptions > 0


def test_a_fork_that_writes_into_shared_pages_is_noticed(monkeypatch):
    """Samples and beams fork inside a half-filled page; without the copy on write they would overwrite one another."""
    model = llama()
    requests = [
        Request(random_ids(9, 3, 97), SamplingParams(max_tokens=9, temperature=1.0, seed=1, n=4, logprobs=True)),
        Request(random_ids(10, 4, 97), SamplingParams(max_tokens=9, beams=4, n=4, logprobs=True)),
    ]
    right = [r for request in requests for n in [request] for r in small_engine(model, cache=False).generate([n])]
    singly = [Engine(model).generate([Request(requests[0].prompt, SamplingParams(max_tokens=9, temperature=1.0, seed=1))])[0]]
    assert same_ids(right[:1], singly)
    engine = small_engine(model, rows=8)
    assert drift(engine.generate(requests), right) < TOLERANCE
    assert leaks(engine) == NOTHING
    reserve = Arena.reserve

    def heedless(arena, lengths, committed=None):
        references, arena.pages.references = arena.pages.references, [min(1, count) for count in arena.pages.references]
        reserve(arena, lengths, committed)
        arena.pages.references = [max(pair) for pair in zip(references, arena.pages.references, strict=False)] + [
            *arena.pages.references[len(references) :]
        ]

    monkeypatch.setattr(Arena, "reserve", heedless)
    assert drift(small_engine(model, rows=8).generate(requests), right) > 1000 * TOLERANCE


def test_cancelling_frees_everything_at_once():
    engine = small_engine(model_of("hybrid"), cache=False)
    numbers = [engine.submit(Request(random_ids(20, n), SamplingParams(max_tokens=9, n=2, temperature=1.0))) for n in range(3)]
    for _ in range(5):
        engine.step()
    assert engine.stats.running > 2
    for number in numbers:
        assert len(engine.cancel(number)) == 2
    assert leaks(engine) == NOTHING
    assert not engine.busy
    assert engine.stats.state_bytes_used == 0


def test_rows_grow_without_the_pool_being_copied():
    engine = small_engine(llama(), rows=8)
    engine.generate([Request(random_ids(40, n, 97), GREEDY) for n in range(2)])
    assert engine._lanes.arena.rows == 2
    pools = [engine._lanes.arena._buffer(key).data_ptr() for key in engine._lanes.arena.leaves]
    engine.generate([Request([n], GREEDY) for n in range(8)])
    assert engine._lanes.arena.rows == 8
    assert pools == [engine._lanes.arena._buffer(key).data_ptr() for key in engine._lanes.arena.leaves]


# the byte budget


@pytest.mark.parametrize("name", ["gqa", "window", "mamba", "hybrid"])
def test_all_state_stays_within_the_budget(name):
    model = model_of(name)
    memory = 120_000
    engine = small_engine(model, rows=8, memory=memory)
    most = 0
    for event in engine.stream(workload(name)):
        assert event.result is None or event.result.finish_reason == "length"
        most = max(most, engine.stats.state_bytes_allocated)
    tables = sum(buffer.numel() * 8 for buffer in (engine._lanes.arena.lens, engine._lanes.arena.table))
    assert 0 < most <= memory + tables
    assert leaks(engine) == NOTHING


def test_what_pages_and_rows_take_is_what_the_spec_says():
    for name in ("gqa", "lstm", "mamba", "everything"):
        model = model_of(name)
        arena = small_engine(model)._lanes.arena
        rings = sum(leaf.num_bytes(1, 8) * (leaf.slots(64, CHUNK) + 1) for leaf in arena.leaves.values() if leaf.kind == "ring")
        spec = model.spec.state_bytes(64, 8) - sum(leaf.num_bytes(64, 8) for leaf in arena.leaves.values() if leaf.kind == "ring")
        assert arena.page_bytes * 16 + arena.row_bytes(64) == spec + rings


def test_a_request_beyond_the_budget_is_refused_by_a_sentence():
    model = llama()
    engine = small_engine(model, memory=20 * PAGE * model.spec.state_bytes(1, 8))
    fits = engine._lanes.max_pages * PAGE
    with pytest.raises(UserError, match=rf"needs the state of {fits + 1} tokens, \d+ bytes, and memory for {fits} tokens is allowed"):
        engine.submit(Request(random_ids(fits - 9, 1, 97), SamplingParams(max_tokens=11)))
    with pytest.raises(UserError, match="4 beams of 29"):
        engine.submit(Request(random_ids(20, 1, 97), SamplingParams(max_tokens=10, beams=4)))
    exact = engine.generate([Request(random_ids(fits - 9, 1, 97), SamplingParams(max_tokens=10))])[0]
    assert len(exact.ids) == 10
    open_ended = engine.generate([Request(random_ids(fits - 9, 1, 97))])[0]
    assert (len(open_ended.ids), open_ended.finish_reason) == (10, "length")
    with pytest.raises(UserError, match="10 bytes of memory are allowed for decode state, and this model needs at least"):
        Engine(model, memory=10)


def test_fewer_rows_where_memory_does_not_allow_more():
    model = model_of("mamba")
    row = small_engine(model)._lanes.arena.row_bytes(64)
    assert Engine(model, rows=16, memory=7 * row)._lanes.limit == 3
    assert same_ids(Engine(model, rows=16, memory=7 * row).generate(workload("mamba")[4:5]), solo(model, workload("mamba")[4:5]))


def test_the_machine_says_how_much_memory_is_left():
    assert (64 << 20) < available_memory() < (1 << 46)


# the cost of a token follows its text


def test_a_token_reads_no_more_pages_than_its_bucket(monkeypatch):
    model = llama(context=2048)
    engine = Engine(model, rows=2)
    columns = []
    table = Arena.step

    def watched(arena, n_new, length, rows=None, keep="all", columns_=None, **options):
        columns.append(options["columns"])
        return table(arena, n_new, length, rows, keep, **options)

    monkeypatch.setattr(Arena, "step", watched)
    engine.generate([Request(random_ids(100, 1, 97), SamplingParams(max_tokens=60))])
    assert set(columns) == {2, 4}, "128 tokens, then 256, of a context of 2048"


@pytest.mark.parametrize("name", ["gqa", "window", "hybrid"])
def test_buckets_change_nothing(name, monkeypatch):
    model, requests = model_of(name), workload(name)[:7]
    right = small_engine(model).generate(requests)
    monkeypatch.setattr(Lanes, "_bucket", lambda lanes, length: length + 1)
    assert drift(small_engine(model).generate(requests), right) < TOLERANCE
    monkeypatch.setattr(Lanes, "columns_of", lambda lanes, fed, count: max(1, -(-max(lane.fed for lane in fed) // PAGE) - 1))
    if name != "window":  # control: a bucket that is too short
        assert drift(small_engine(model).generate(requests), right) > 1000 * TOLERANCE
