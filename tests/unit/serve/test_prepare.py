"""Conversations with tools, for chat templates that have words for them and for those that have none."""

from dataclasses import replace

import pytest

from weft.errors import UserError
from weft.serve.errors import ApiError
from weft.serve.prepare import render
from weft.serve.schema import ChatRequest
from weft.serve.server import served_names
from weft.tokenizer.train import train_tokenizer

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
WITH_TOOLS = "{% if tools %}[{{ tools | length }} {{ tools[0].function.name }}]{% endif %}" + PLAIN.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.city }}){% endfor %}.",
)
BODY = {
    "model": "small",
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
}  # fmt: skip


def rendered(template, body=BODY):
    tokenizer = train_tokenizer("bpe", ["the quick brown fox " * 9], 270)
    tokenizer.settings = replace(tokenizer.settings, chat_templates={"default": template})
    request = ChatRequest.model_validate(body)
    return tokenizer.decode(render(tokenizer, request.messages, request.tools or ()))


def test_a_template_with_tools_gets_them():
    assert rendered(WITH_TOOLS) == "[1 weather]<user>Weather?.\n<assistant>(weather Paris).\n<tool>sunny.\n<assistant>"


def test_a_template_without_tools_gets_words():
    text = rendered(PLAIN)
    system, rest = text.split("\n<user>Weather?\n")
    assert system.startswith("<system>You can call")
    assert '"name": "weather"' in system
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert rest == f"<assistant>{call}\n<user><tool_response>\nsunny\n</tool_response>\n<assistant>"
    said = rendered(PLAIN, BODY | {"messages": [{"role": "developer", "content": "Be brief."}, *BODY["messages"]]})
    assert said.startswith("<system>Be brief.\n\nYou can call")
    assert rendered(NO_SYSTEM).startswith("<user>You can call")


def test_arguments_that_are_no_json_are_refused():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
        {"id": "x", "function": {"name": "f", "arguments": "{city}"}}]}]  # fmt: skip
    with pytest.raises(ApiError, match="arguments of the call 'x' are not JSON"):
        rendered(PLAIN, BODY | {"messages": messages})


def test_names_under_which_models_are_served(tmp_path, monkeypatch):
    (tmp_path / "a=b").mkdir()
    folder = str(tmp_path / "a=b")
    assert served_names(["smollm2-135m", "fast=smollm2-135m", folder]) == {
        "smollm2-135m": "smollm2-135m",
        "fast": "smollm2-135m",
        "a=b": folder,
    }
    monkeypatch.chdir(folder)
    assert served_names(["."]) == {"a=b": "."}
    with pytest.raises(UserError, match="served as 'x'"):
        served_names(["x", "x=y"])
