"""Chat templates render as in transformers, safely, and their ids have one BOS."""

from typing import Any

import pytest
from tokenizer_cases import data, loaded, sample_text, trained

from paths import SHARED
from weft.errors import UserError
from weft.tokenizer import Settings, Tokenizer, chat
from weft.tokenizer.train import train_tokenizer

TEMPLATES = [] if SHARED is None else sorted(path.name for path in (SHARED / "tokenizers" / "chat-templates").glob("*.jinja"))
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "What's 2+2? <b>&amp;</b>"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "¿Y 3?\n\n"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add <two> “numbers”",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
        },
    }
]
CALL = [
    {"role": "user", "content": "add"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "name": "add", "content": "2", "tool_call_id": "abcdefghi"},
]
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]] = {
    "talk": (TALK, None, False),
    "prompt": (TALK, None, True),
    "system": ([{"role": "system", "content": "Be brief."}, *TALK], None, True),
    "tools": (TALK, TOOLS, True),
    "call": (CALL, TOOLS, True),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = data(f"chat-templates/{name}").read_text()
    rendered = 0
    for messages, tools, prompt in CASES.values():
        arguments = {"conversations": [messages], "tools": tools, "chat_template": template, "add_generation_prompt": prompt}
        try:
            expected = render_jinja_template(**arguments, **ROLES)[0][0]
        except Exception:
            with pytest.raises(UserError, match="chat template"):
                chat.render(template, messages, prompt, tools, ROLES)
        else:
            assert chat.render(template, messages, prompt, tools, ROLES) == expected
            rendered += 1
    assert rendered >= 2


def test_the_generation_prompt_is_seen() -> None:
    """Negative control for the comparison above."""
    template = "{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}"
    assert chat.render(template, TALK, True) != chat.render(template, TALK, False)


def test_whitespace_filters_tags_and_variables() -> None:
    template = (
        "  {% for message in messages %}\n{% if loop.index == 3 %}{% break %}{% endif %}\n"
        "{% generation %}{{ message.content }}{% endgeneration %}|{% endfor %}\n"
        "{{ {'b': '<é>', 'a': [1, none]} | tojson }}{{ {'a': 1} | tojson(indent=2) }}{{ style }}{{ strftime_now('%Y') | length }}"
    )
    expected = 'What\'s 2+2? <b>&amp;</b>|4|{"b": "<é>", "a": [1, null]}{\n  "a": 1\n}dry4'
    assert chat.render(template, TALK, variables={"style": "dry"}) == expected


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('Only two roles!') }}", "refuses these messages: Only two roles!"),
        ("{{ undefined_name.field }}", "refuses these messages"),
        ("{{ messages + 1 }}", "fails on these messages"),
        ("{{ 1 // 0 }}", "fails on these messages"),
        ("{{ ''.__class__.__mro__ }}", "may not do"),
        ("{{ messages.append({}) }}", "may not do"),
        ("{% set space = namespace() %}{% set space.__class__ = 1 %}", "may not do|not valid"),
        ("{{ namespace(__init__=1) }}", "may not do"),
        ("{{ cycler.__init__.__globals__ }}", "may not do"),
        ("{% include '/etc/passwd' %}", "fails on these|refuses"),
        ("{{ range(10000000) | list }}", "fails on these|may not do"),
    ],
)
def test_a_bad_template_is_a_sentence(template: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        chat.render(template, TALK)


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, [{"content": "x"}], ["x"], [{"role": "user", "content": object()}]])
def test_bad_messages_are_a_sentence(messages: Any) -> None:
    with pytest.raises(UserError, match="messages"):
        chat.render("{{ messages }}", messages)


def _talker(template: str, prefix: tuple[int, ...]) -> Tokenizer:
    base = train_tokenizer("bpe", [sample_text()], 400, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(base.backend, Settings(ROLES, prefix=prefix, chat_templates={"default": template}))


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
@pytest.mark.parametrize("prefix", [(), (0,)])
def test_one_bos_at_most(template: str, prefix: tuple[int, ...]) -> None:
    tokenizer = _talker(template, prefix)
    ids = tokenizer.apply_chat(TALK)
    wanted = 1 if prefix or "bos_token" in template else 0
    assert ids.count(0) == wanted
    assert ids[: wanted + 1] == [0, 2][1 - wanted :]
    assert (ids.count(2), ids.count(3)) == (3, 3)
    assert tokenizer.eos_ids == (1, 3)


def test_a_template_of_its_own_for_tools() -> None:
    base = _talker(CHATML, ())
    both = Settings(ROLES, chat_templates={"default": CHATML, "tool_use": "{{ tools | length }} tools"})
    tokenizer = Tokenizer(base.backend, both)
    assert tokenizer.render_chat(TALK, tools=TOOLS) == "1 tools"
    assert tokenizer.render_chat(TALK).startswith("<|im_start|>user")


def test_no_template_is_a_sentence() -> None:
    with pytest.raises(UserError, match="no chat template"):
        trained("bpe").apply_chat(TALK)


def test_the_template_inside_a_gguf_file() -> None:
    tokenizer = loaded("ggml-vocab-phi-3.gguf")
    text = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert text == "<s><|user|>\nHi<|end|>\n<|assistant|>\n"
    ids = tokenizer.apply_chat([{"role": "user", "content": "Hi"}])
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert [tokenizer.token(index) for index in ids if index in tokenizer.special_ids] == ["<s>", "<|user|>", "<|end|>", "<|assistant|>"]
