"""The official client against a live server: chat, streams, choices, log-probabilities, schemas, tools, embeddings and errors."""

import base64
import json
import math
import struct

import openai
import pytest
from serve_cases import make_model, serving

ASK = [{"role": "user", "content": "the quick"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Madrid"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "small")
    make_model(folder / "plain", chat=False, seed=3)
    with serving(folder / "small", f"other={folder / 'plain'}", "--dtype", "float32", environment={"WEFT_API_KEY": "sesame"}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0, timeout=60)


def chat(client, **fields):
    return client.chat.completions.create(**({"model": "small", "messages": ASK, "temperature": 0, "max_completion_tokens": 12} | fields))


def test_models_are_listed_under_their_names(client):
    assert [model.id for model in client.models.list()] == ["small", "other"]
    assert client.models.retrieve("other").model_extra == {"context_length": 1024, "chat": False}


def test_an_answer_and_its_usage(client):
    done = chat(client)
    choice = done.choices[0]
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert choice.message.content
    assert done.usage.completion_tokens == 12
    assert done.usage.total_tokens == done.usage.prompt_tokens + 12
    assert chat(client).choices[0].message.content == choice.message.content
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}]}]
    assert chat(client, messages=parts).choices[0].message.content == choice.message.content


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(client, n):
    fields = {"n": n, "seed": 7, "temperature": 1.0, "logprobs": True, "top_logprobs": 2, "stop": ["q", "zz"]}
    whole = chat(client, **fields)
    chunks = list(chat(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for expected in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == expected.index]
        assert mine[0].delta.role == "assistant"
        assert all(each.delta.role is None for each in mine[1:])
        assert "".join(each.delta.content or "" for each in mine) == expected.message.content
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + [expected.finish_reason]
        assert [token for each in mine for token in (each.logprobs.content if each.logprobs else [])] == expected.logprobs.content
    plain = list(chat(client, **fields, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_choices_differ_and_a_seed_brings_them_back(client):
    fields = {"n": 4, "temperature": 1.5, "seed": 11}
    first, again, other = (chat(client, **fields | {"seed": seed}) for seed in (11, 11, 12))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    assert texts != [choice.message.content for choice in other.choices]


def test_a_stop_text_ends_the_answer_before_it(client):
    whole = chat(client, max_completion_tokens=40).choices[0].message.content
    stop = whole[10:13]
    done = chat(client, max_completion_tokens=40, stop=stop).choices[0]
    assert (done.message.content, done.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_are_of_the_tokens_shown(client):
    done = chat(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = done.logprobs.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode("utf-8", "replace") == done.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy takes the likeliest
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-5
    whole = chat(client, max_completion_tokens=40, logprobs=True, top_logprobs=0).choices[0]
    cut = chat(client, max_completion_tokens=40, logprobs=True, top_logprobs=0, stop=whole.message.content[10:13]).choices[0]
    shown = "".join(token.token for token in cut.logprobs.content)
    assert shown.startswith(cut.message.content)
    assert len(shown) < len(cut.message.content) + len(cut.logprobs.content[-1].token)


def test_a_bias_bars_or_forces_a_token(client, server):
    ids = client.post("/../tokenize", body={"model": "small", "prompt": "q"}, cast_to=object)["tokens"]
    forced = chat(client, logit_bias={str(ids[0]): 100}, max_completion_tokens=5).choices[0].message.content
    assert forced == "q" * 5
    barred = chat(client, logit_bias={str(ids[0]): -100}, max_completion_tokens=60).choices[0].message.content
    assert "q" not in barred.replace("qu", "")


def test_penalties_and_filters_are_taken(client):
    plain = chat(client, max_completion_tokens=60).choices[0].message.content
    assert chat(client, max_completion_tokens=60, frequency_penalty=2, presence_penalty=2).choices[0].message.content != plain
    own = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    assert chat(client, max_completion_tokens=60, temperature=2, top_p=0.9, extra_body=own).choices[0].message.content == plain


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_is_kept(client, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": SCHEMA, "strict": True}}
    done = chat(client, response_format=form, n=3 if temperature else 1, temperature=temperature, max_completion_tokens=100)
    for choice in done.choices:
        value = json.loads(choice.message.content)
        assert set(value) == {"name", "count"}
        assert 0 <= value["count"] <= 99
        assert choice.finish_reason == "stop"
    with pytest.raises(ValueError):
        json.loads(chat(client, max_completion_tokens=100).choices[0].message.content)


def test_any_object_is_an_object(client):
    bias = {str(token): 20 for token in client.post("/../tokenize", body={"model": "small", "prompt": "}"}, cast_to=object)["tokens"]}
    done = chat(client, response_format={"type": "json_object"}, max_completion_tokens=60, logit_bias=bias).choices[0]
    assert isinstance(json.loads(done.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_demanded_can_be_made(client, choice):
    done = chat(client, tools=[WEATHER, TIME], tool_choice=choice, max_completion_tokens=120, temperature=1, seed=5).choices[0]
    assert (done.finish_reason, done.message.content) == ("tool_calls", None)
    (call,) = done.message.tool_calls
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert arguments["city"] in ("Paris", "Madrid")
        assert 1 <= arguments["days"] <= 9
    else:
        assert (call.function.name, arguments, choice) == ("get_time", {}, "required")
    answer = [done.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert chat(client, messages=ASK + answer, tools=[WEATHER]).choices[0].message.role == "assistant"


def test_calls_are_streamed(client):
    fields = {"tools": [WEATHER, TIME], "tool_choice": "required", "max_completion_tokens": 400, "temperature": 1, "seed": 5}
    whole = chat(client, **fields, parallel_tool_calls=True).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(client, **fields, parallel_tool_calls=True, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls
    ]
    assert not any(chunk.delta.content for chunk in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


def test_without_the_demand_text_is_free(client):
    done = chat(client, tools=[WEATHER], temperature=0).choices[0]
    assert done.message.content
    assert done.message.tool_calls is None
    none = chat(client, tools=[WEATHER], tool_choice="none").choices[0]
    assert none.message.content == chat(client).choices[0].message.content  # as if there were no tools


def test_completions_of_texts_and_ids(client):
    done = client.completions.create(model="other", prompt=["the quick", "Line 7"], n=2, temperature=0, max_tokens=6, logprobs=2)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.choices[0].text == done.choices[1].text
    assert done.choices[0].text != done.choices[2].text
    ids = client.post("/../tokenize", body={"model": "other", "prompt": "the quick"}, cast_to=object)["tokens"]
    one = client.completions.create(model="other", prompt=ids, temperature=0, max_tokens=6, logprobs=2)
    shown, batched = one.choices[0].logprobs, done.choices[0].logprobs
    assert (one.choices[0].text, shown.tokens) == (done.choices[0].text, batched.tokens)
    assert shown.token_logprobs == pytest.approx(batched.token_logprobs, abs=1e-4)
    text = one.choices[0].text
    assert shown.text_offset == sorted(shown.text_offset)
    places = zip(shown.tokens, shown.text_offset, strict=True)
    assert all(text[place : place + 1 + len(token)].count(token) for token, place in places if not token.startswith("bytes:"))
    assert all(token in best for token, best in zip(shown.tokens, shown.top_logprobs, strict=True))  # greedy takes the likeliest
    assert done.usage.completion_tokens == 24
    chunks = list(client.completions.create(model="other", prompt=["the quick", "Line 7"], temperature=0, max_tokens=6, stream=True))
    texts = ["".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index) for index in (0, 1)]
    assert texts == [done.choices[0].text, done.choices[2].text]
    assert client.completions.create(model="other", prompt="the").usage.completion_tokens <= 16


def test_embeddings_have_length_one_and_do_not_depend_on_company(client):
    texts = ["the quick brown fox", "the quick brown dog", "Line 7: " * 50]
    data = client.embeddings.create(model="small", input=texts).data  # the client asks for base64
    assert [each.index for each in data] == [0, 1, 2]
    vectors = [each.embedding for each in data]
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-5 for vector in vectors)
    alone = client.embeddings.create(model="small", input=texts[2], encoding_format="float")
    assert alone.data[0].embedding == pytest.approx(vectors[2], abs=1e-6)
    raw = client.post("/embeddings", body={"model": "small", "input": "the", "encoding_format": "base64"}, cast_to=object)
    assert len(struct.unpack("<32f", base64.b64decode(raw["data"][0]["embedding"]))) == 32
    close, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    assert far < close


def test_tokens_there_and_back(client):
    text = "the quick été ✓"
    there = client.post("/../tokenize", body={"model": "small", "prompt": text, "return_token_strs": True}, cast_to=object)
    assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
    assert client.post("/../detokenize", body={"model": "small", "tokens": there["tokens"]}, cast_to=object) == {"prompt": text}
    said = client.post("/../tokenize", body={"model": "small", "messages": ASK}, cast_to=object)
    assert said["count"] == chat(client).usage.prompt_tokens


REFUSED = {
    "unknown model": (openai.NotFoundError, {"model": "smal"}, "model", "Did you mean 'small'"),
    "no chat template": (openai.BadRequestError, {"model": "other"}, "messages", "no chat template"),
    "empty messages": (openai.BadRequestError, {"messages": []}, "messages", "at least 1"),
    "unknown role": (openai.BadRequestError, {"messages": [{"role": "bot", "content": "a"}]}, "messages[0]", "role is system"),
    "a picture": (openai.BadRequestError, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                  "messages[0].content[0].type", "'text'"),
    "wrong type": (openai.BadRequestError, {"temperature": "hot"}, "temperature", "valid number"),
    "huge number": (openai.BadRequestError, {"seed": 10**30}, "seed", "9223372036854775807"),
    "too hot": (openai.BadRequestError, {"temperature": 1e308}, "temperature", "less than or equal to 2"),
    "too many stops": (openai.BadRequestError, {"stop": list("abcde")}, "stop", "at most 4"),
    "unsupported": (openai.BadRequestError, {"store": True}, "store", "not supported"),
    "mistyped": (openai.BadRequestError, {"extra_body": {"temprature": 1}}, "temprature", "Did you mean 'temperature'"),
    "two limits": (openai.BadRequestError, {"max_tokens": 3}, "max_tokens", "leave one out"),
    "top without": (openai.BadRequestError, {"top_logprobs": 3}, "top_logprobs", "logprobs is not true"),
    "choice without": (openai.BadRequestError, {"tool_choice": "required"}, "tool_choice", "no tools"),
    "foreign bias": (openai.BadRequestError, {"logit_bias": {"99999": 1}}, None, "99999"),
    "no such tool": (openai.BadRequestError, {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "f"}}},
                     "tool_choice", "get_time"),
    "impossible": (openai.BadRequestError, {"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"type": "integer", "minimum": 2, "maximum": 1}}}}, "response_format", "Unsatisfiable"),
    "unsupported schema": (openai.BadRequestError, {"tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"not": {}}}}]}, "tools", "Unimplemented"),
    "too long": (openai.BadRequestError, {"messages": [{"role": "user", "content": "fox " * 1200}]}, "messages", "context is 1024"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_refused_says_why(client, case, stream):
    kind, fields, param, said = REFUSED[case]
    with pytest.raises(kind) as caught:
        list(chat(client, **fields, stream=stream))
    assert caught.value.body["param"] == param
    assert said in caught.value.body["message"]
    assert "\n" not in caught.value.body["message"]
    if case == "too long":
        assert caught.value.code == "context_length_exceeded"
        assert [int(word) > 1024 for word in caught.value.body["message"].split() if word.isdigit()] == [True]


def test_a_key_is_asked_for(server):
    for key in ("wrong", "sesam", "sesame2"):
        with pytest.raises(openai.AuthenticationError):
            chat(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0))
