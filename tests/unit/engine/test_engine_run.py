"""The engine at work: streaming, stops, cancelling, contexts, broken models."""

from dataclasses import replace

import pytest
import torch
from engine_cases import VOCAB, drift, llama, model_of, prompts, random_ids, same_ids

from weft.engine import Engine, Request, SamplingParams
from weft.errors import UserError
from weft.nn import build
from weft.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=8, logprobs=True)


@pytest.fixture(scope="module")
def tokenizer():
    """97 ids: the printable ASCII characters but the last, a special end token and one without text."""
    import tokenizers

    chars = [chr(code) for code in range(32, 127)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: index for index, char in enumerate(chars)}, [], unk_token=None))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<eos>", "<pad>"])
    from weft.tokenizer import Settings

    return Tokenizer(backend, Settings(roles={"eos_token": "<eos>"}))


def greedy_by_hand(model, prompt, count):
    """The definition: one parallel pass over everything for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("name", ["gqa", "window", "mamba", "lstm", "hybrid", "learned"])
def test_greedy_equals_one_parallel_pass_a_token(name):
    model = model_of(name)
    results = Engine(model, rows=2, chunk=7).generate([Request(prompt, GREEDY) for prompt in prompts()])
    assert [result.ids for result in results] == [greedy_by_hand(model, prompt, 8) for prompt in prompts()]


def test_events_put_together_are_the_results(tokenizer):
    engine = Engine(llama(), tokenizer, rows=2)
    requests = [Request("abc", SamplingParams(max_tokens=9, temperature=1.0, seed=3, n=2, logprobs=True)), Request("Hello", GREEDY)]
    events = list(engine.stream(requests))
    results = {(event.request, event.index): event.result for event in events if event.result}
    assert set(results) == {(0, 0), (0, 1), (1, 0)}
    for key, result in results.items():
        mine = [event for event in events if (event.request, event.index) == key]
        assert tuple(event.token for event in mine) == result.ids
        assert "".join(event.text for event in mine) == result.text == tokenizer.decode(result.ids)
        assert tuple(event.logprob for event in mine) == result.logprobs
        assert [event.result for event in mine[:-1]] == [None] * (len(mine) - 1)
    assert not engine.busy


def test_streaming_and_generating_are_the_same(tokenizer):
    requests = [Request(prompt, GREEDY) for prompt in prompts(97)]
    streamed = [event.result for event in Engine(llama(), tokenizer, rows=2).stream(requests) if event.result]
    assert same_ids(sorted(streamed, key=lambda result: result.request), Engine(llama(), tokenizer, rows=2).generate(requests))


def test_end_tokens_end_and_are_not_text(tokenizer):
    model = llama()
    ids = Engine(model).generate([Request([5, 6, 7], SamplingParams(max_tokens=20))])[0].ids
    at = next(place for place in range(3, 20) if ids[place] not in ids[:place])
    stopped = Engine(model).generate([Request([5, 6, 7], SamplingParams(max_tokens=20, stop_ids=(ids[at],)))])[0]
    assert (stopped.ids, stopped.finish_reason) == (ids[: at + 1], "stop")
    text = Engine(model, tokenizer).generate([Request([5, 6, 7], SamplingParams(max_tokens=20, stop_ids=(ids[at],)))])[0].text
    assert text == tokenizer.decode(ids[:at])


def test_the_tokenizers_end_token_ends(tokenizer):
    eos = tokenizer.eos_ids[0]
    model = build(llama().spec, dtype=torch.float64, seed=1)
    model.load_state_dict(llama().state_dict())
    with torch.no_grad():
        model.head.weight[eos] = 100 * model.head.weight[5]
    engine = Engine(model, tokenizer)
    ended, ignored = (engine.generate([Request("abc", SamplingParams(max_tokens=30, ignore_eos=flag))])[0] for flag in (False, True))
    assert ended.finish_reason == "stop"
    assert ended.ids[-1] == eos
    assert "<eos>" not in ended.text
    assert ignored.finish_reason == "length"
    assert ignored.ids[: len(ended.ids)] == ended.ids


def test_stop_strings_span_tokens(tokenizer):
    engine = Engine(llama(), tokenizer)
    whole = engine.generate([Request("abc", SamplingParams(max_tokens=30))])[0].text
    stop = whole[11:15]
    events = list(engine.stream([Request("abc", SamplingParams(max_tokens=30, stop=stop))]))
    result = events[-1].result
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)]
    assert "".join(event.text for event in events) == result.text
    assert len(result.ids) == whole.index(stop) + len(stop)


def test_the_context_is_never_exceeded():
    model = llama(context=32)
    engine = Engine(model, rows=2, chunk=7)
    results = engine.generate([Request(random_ids(length, 1, 97), SamplingParams()) for length in (30, 31, 32, 1)])
    assert [len(result.ids) for result in results] == [2, 1, 0, 31]
    assert {result.finish_reason for result in results} == {"length"}
    with pytest.raises(UserError, match="33 tokens and the model's context is 32"):
        engine.generate([Request(random_ids(33, 1, 97), SamplingParams())])
    with pytest.raises(UserError, match="9 tokens and the model's context is 8"):
        Engine(model, context=8).generate([Request(random_ids(9, 1, 97), SamplingParams())])


def test_long_texts_outgrow_the_first_arena():
    model = llama(context=512)
    prompt = random_ids(120, 3, 97)
    engine = Engine(model, rows=2, chunk=32)
    sizes = []
    for _ in engine.stream([Request(prompt, SamplingParams(max_tokens=150)), Request([1], SamplingParams(max_tokens=20))]):
        sizes.append(engine._lanes.arena.max_len)
    assert sizes == sorted(sizes)
    assert sizes[0] < 270 <= sizes[-1]
    assert Engine(model, chunk=512).generate([Request(prompt, SamplingParams(max_tokens=150))])[0].ids == greedy_by_hand(model, prompt, 150)


def test_requests_may_come_and_go_while_others_run():
    model = llama()
    texts = prompts(97)
    want = Engine(model).generate([Request(text, SamplingParams(max_tokens=12)) for text in texts])
    engine = Engine(model, rows=2, chunk=7)
    results, cancelled = {}, []
    numbers = [engine.submit(Request(text, SamplingParams(max_tokens=12))) for text in texts[:4]]
    steps = 0
    while engine.busy:
        for event in engine.step():
            if event.result:
                results[event.request] = event.result
        steps += 1
        if steps == 3:
            cancelled = engine.cancel(numbers[1])
        if steps == 5:
            numbers.append(engine.submit(Request(texts[4], SamplingParams(max_tokens=12))))
    assert [result.finish_reason for result in cancelled] == ["cancelled"]
    assert 0 < len(cancelled[0].ids) < 12
    assert cancelled[0].ids == want[1].ids[: len(cancelled[0].ids)]
    assert sorted(results) == [0, 2, 3, 4]
    assert all(result.ids == want[number].ids for number, result in results.items())
    assert engine.cancel(99) == []


def test_a_waiting_request_and_its_samples_can_be_cancelled():
    engine = Engine(llama(), rows=1)
    engine.submit(Request([1, 2, 3], SamplingParams(max_tokens=4)))
    waiting = engine.submit(Request([4, 5], SamplingParams(max_tokens=4, n=3, temperature=1.0)))
    engine.step()
    assert [result.ids for result in engine.cancel(waiting)] == [(), (), ()]
    while engine.busy:
        assert all(event.request == 0 for event in engine.step())


def test_who_stops_listening_stops_the_work():
    engine = Engine(llama(), rows=1)
    for event in engine.stream([Request([1, 2], SamplingParams(max_tokens=50)), Request([3], SamplingParams(max_tokens=50))]):
        if event.token is not None:
            break
    assert not engine.busy
    assert len(engine.generate([Request([1, 2], GREEDY)])[0].ids) == 8
    engine.submit(Request([1], GREEDY))
    with pytest.raises(UserError, match="busy"):
        engine.generate([Request([1, 2], GREEDY)])


# broken models


@pytest.mark.parametrize("others", [{}, {"temperature": 1.0, "seed": 1, "top_p": 0.9}, {"presence_penalty": 0.5}])
def test_logits_that_are_not_finite_end_the_request_and_leave_nothing_behind(others):
    params = replace(GREEDY, **others)
    model = build(llama().spec, dtype=torch.float64, seed=1)
    model.load_state_dict(llama().state_dict())
    with torch.no_grad():
        model.embed.weight[13] = torch.nan
    bad, good = Request([1, 13, 2], params), Request([1, 12, 2], params)
    engine = Engine(model, rows=1)
    with pytest.raises(UserError, match="not finite"):
        engine.generate([bad])
    assert not engine.busy
    want = Engine(llama()).generate([good])
    assert drift(engine.generate([good]), want) < 1e-10
    engine = Engine(model, rows=2)
    numbers = [engine.submit(request) for request in (good, bad)]
    results = {}
    while engine.busy:
        results |= {event.request: event.result for event in engine.step() if event.result}
    assert results[numbers[1]].finish_reason == "error"
    assert results[numbers[0]].ids == want[0].ids


def test_the_model_is_put_in_evaluation_mode():
    spec = llama().spec
    model = build(type(spec).model_validate(spec.model_dump() | {"dropout": {"residual": 0.5}}), seed=1).train()
    engine = Engine(model)
    first, second = (engine.generate([Request([1, 2, 3], GREEDY)]) for _ in range(2))
    model.train()
    third = engine.generate([Request([1, 2, 3], GREEDY)])
    assert drift(first, second) == drift(first, third) == 0


def test_vocabulary_of_the_suite_is_what_prompts_are_made_of():
    assert max(map(max, prompts())) < VOCAB
