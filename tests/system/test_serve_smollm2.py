"""A real model behind the server: what it says, the schemas it keeps, the tools it calls."""

import json

import jsonschema_rs
import openai
import pytest
from serve_cases import serving

from weft.errors import UserError
from weft.weights.hub import find_model

MODEL = "smollm2-135m"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]{1,10}@[a-z]{1,10}\\.com$"},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/pet"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "email", "pets"],
    "additionalProperties": False,
    "$defs": {
        "pet": {
            "type": "object",
            "properties": {"kind": {"enum": ["cat", "dog"]}, "good": {"type": "boolean"}},
            "required": ["kind", "good"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = {
    "person": PERSON,
    "choice": {"enum": ["yes", "no", None, 7]},
    "date": {"type": "string", "format": "date"},
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    "either": {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "array", "items": {"const": 0}, "maxItems": 2}]},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 24}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client():
    try:
        find_model(MODEL)
    except UserError:
        pytest.skip(f"{MODEL} has not been pulled: weft pull {MODEL}")
    with serving(MODEL) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client, text, **fields):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(**({"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 120} | fields)).choices[
        0
    ]


def test_it_knows_a_capital(client):
    assert ask(client, "What is the capital of France?").message.content == "The capital of France is Paris."


@pytest.mark.parametrize("name", SCHEMAS)
def test_greedy_answers_are_valid(client, name):
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name]}}
    choice = ask(client, "Describe Alice, who has a cat, and answer in JSON.", response_format=form)
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    assert jsonschema_rs.is_valid(SCHEMAS[name], value)
    assert not jsonschema_rs.is_valid(SCHEMAS[name], {"answer": value})


def test_embeddings_tell_texts_apart(client):
    texts = ["A cat sleeps on the sofa.", "A kitten is asleep on the couch.", "Interest rates rose by a quarter of a percent."]
    vectors = [each.embedding for each in client.embeddings.create(model=MODEL, input=texts).data]
    close, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    assert far < close < 1


def test_it_calls_a_tool_and_uses_what_comes_back(client):
    question = "What is the weather in Paris?"
    called = ask(client, question, tools=[WEATHER], tool_choice="required")
    (call,) = called.message.tool_calls
    assert (called.finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert json.loads(call.function.arguments)["city"].startswith("Paris")
    messages = [{"role": "user", "content": question}, called.message, {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."}]
    assert "sunny" in ask(client, "", messages=messages, tools=[WEATHER], tool_choice="none").message.content
