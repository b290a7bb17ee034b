"""Tool calls: the grammar allows these texts and no others, and what was called is read back out of them, whole or in pieces."""

import json

import pytest

from weft.engine import Grammar
from weft.engine.grammar import GrammarCompiler
from weft.serve.schema import Tool
from weft.serve.tools import Call, CallSplitter, grammar, preamble, write_call
from weft.tokenizer.train import train_tokenizer

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "weather", "description": "The \"weather\".", "parameters": PARAMETERS}}),
    Tool.model_validate({"type": "function", "function": {"name": "time"}}),
]  # fmt: skip
PARIS, TIME = write_call("weather", {"city": "Paris"}), write_call("time", {})
ANSWER = Grammar.json_schema(
    {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
)


@pytest.fixture(scope="module")
def compiler():
    tokenizer = train_tokenizer("bpe", ['<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call> sunny\n' * 20], 300)
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def allows(compiler, form, text):
    """Whether a text is allowed as a whole."""
    matcher = compiler.matcher(form)
    for token in compiler.tokenizer.encode(text, bos=False):
        if not matcher.allowed[token]:
            return False
        matcher.accept(token)
    return matcher.done or bool(matcher.allowed[list(compiler.tokenizer.eos_ids)].any())


BROKEN = [
    PARIS.replace("weather", "wether"),
    PARIS.replace('"Paris"', "7"),
    PARIS.replace('"city"', '"town"'),
    PARIS.removesuffix("</tool_call>"),
    "",
]


@pytest.mark.parametrize(("required", "most", "answer", "good", "bad"), [
    (True, 1, None, [PARIS, TIME], [*BROKEN, "sunny", f"sunny {PARIS}", f"{PARIS}\n{TIME}", f"{PARIS} "]),
    (True, 3, None, [PARIS, f"{PARIS}\n{TIME}", f"{TIME}\n{TIME}\n{TIME}"], [f"{PARIS}{TIME}", "\n".join([TIME] * 4)]),
    (False, 1, None, [PARIS, f"sunny\n{PARIS}", "sunny", "a < b", "<tool"], [*BROKEN[:4], f"{PARIS}\nsunny", f"{PARIS}\n{TIME}"]),
    (False, 2, ANSWER, [PARIS, f"{PARIS}\n{TIME}", '{"ok": true}'], [*BROKEN, "sunny", '{"ok": 1}', f"sunny {PARIS}"]),
])  # fmt: skip
def test_the_grammar_allows_calls_and_nothing_like_them(compiler, required, most, answer, good, bad):
    form = grammar(TOOLS, required, most, answer)
    assert [text for text in good if not allows(compiler, form, text)] == []
    assert [text for text in bad if allows(compiler, form, text)] == []


TEXTS = {
    "": ("", []),
    "sunny, a < b": ("sunny, a < b", []),
    "<tool": ("<tool", []),
    PARIS: ("", [Call("weather", '{"city": "Paris"}')]),
    f"Let me see. {PARIS}\n{TIME}": ("Let me see. ", [Call("weather", '{"city": "Paris"}'), Call("time", "{}")]),
    write_call("weather", {"city": '"arguments": {}}\n'}): ("", [Call("weather", '{"city": "\\"arguments\\": {}}\\n"}')]),
    f"a {PARIS[:-4]}": ("a ", []),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_read_however_the_text_is_cut(text, size):
    splitter, said, calls = CallSplitter(), "", []
    for at in range(0, len(text), size):
        shown, found = splitter.push(text[at : at + size])
        assert "<tool_call>" not in shown
        said, calls = said + shown, calls + found
    shown, found = splitter.push("", final=True)
    assert (said + shown, calls + found) == TEXTS[text]


def test_the_description_of_tools_is_json():
    lines = preamble(TOOLS).split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"]["name"] for line in lines] == ["weather", "time"]
    assert json.loads(lines[0])["function"]["parameters"] == PARAMETERS
