"""Tools: how they are told to a model, the grammar that holds it to calls that can be parsed, and the calls back out of its text.

A call is written as `<tool_call>`, one JSON object with name and arguments, `</tool_call>`, each on a line of its own: the form that
Hermes, Qwen and others are trained on. A chat template that takes tools writes their descriptions itself; for one that does not, a
system message does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.engine import Grammar
from weft.engine.grammar import JSON_LAYOUT
from weft.serve.schema import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 8

PREAMBLE = """You can call the functions listed between <tools> and </tools>, one JSON object a line, whose parameters are JSON schemas.

<tools>
{tools}
</tools>

To call a function, answer with its name and arguments as JSON between <tool_call> and </tool_call>, and nothing else:

<tool_call>
{{"name": "the function's name", "arguments": {{"a parameter": "its value"}}}}
</tool_call>"""


@dataclass(frozen=True)
class Call:
    """A function that the model calls, its arguments as the JSON text it wrote."""

    name: str
    arguments: str


def preamble(tools: Sequence[Tool]) -> str:
    """What a system message says of tools where the chat template cannot."""
    return PREAMBLE.format(tools="\n".join(json.dumps(describe(tool), ensure_ascii=False) for tool in tools))


def describe(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates expect it."""
    function = tool.function
    text = {} if function.description is None else {"description": function.description}
    return {"type": "function", "function": {"name": function.name, **text, "parameters": function.parameters}}


def write_call(name: str, arguments: Any) -> str:
    """A call as the model would have written it."""
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n{CLOSE}"


def grammar(tools: Sequence[Tool], required: bool, most: int, answer: Grammar | None) -> Grammar:
    """The texts of calls to these tools.

    required  a call must come; otherwise the model may also answer, and may say something before its first call.
    most      calls in one text.
    answer    what an answer without calls must match.
    """
    rules = [f"n{i}: {_quoted(_head(tool))} %json {_laid_out(tool.function.parameters)}" for i, tool in enumerate(tools)]
    names = " | ".join(f"n{i}" for i in range(len(tools)))
    rules.append(f"body: ({names}) {_quoted('}' + chr(10) + CLOSE)}")
    more = f" ({_quoted(chr(10) + OPEN)} body){{0,{most - 1}}}" if most > 1 else ""
    if required or answer is not None:
        rules.append(f"calls: {_quoted(OPEN)} body{more}")
    else:
        rules += [f"calls: lead body{more}", f"lead[lazy]: TEXT {_quoted(OPEN)}", r"TEXT: /(.|\n)*/"]
    if required:
        start = "calls"
    elif answer is None:
        start = "calls | free\nfree: TEXT"
    else:
        start = f"calls | form\nform: %json {_laid_out(json.loads(answer.source))}"
    return Grammar("lark", "\n".join([f"start: {start}", *rules]))


def _head(tool: Tool) -> str:
    return f'\n{{"name": {json.dumps(tool.function.name)}, "arguments": '


def _laid_out(schema: Mapping[str, Any]) -> str:
    return json.dumps({"x-guidance": JSON_LAYOUT, **schema})


def _quoted(text: str) -> str:
    return json.dumps(text)


_BLOCK = re.compile(rf"\s*{OPEN}\n(.*?)\n{CLOSE}", re.DOTALL)


@dataclass
class CallSplitter:
    """Tells what is said from what is called, in a text that comes piece by piece."""

    _held: str = ""
    _in_calls: bool = False

    def push(self, text: str, final: bool = False) -> tuple[str, list[Call]]:
        """What a further piece lets show, and the calls that it completes."""
        self._held += text
        shown = "" if self._in_calls else self._say(final)
        found = self._complete() if self._in_calls else []
        return shown, found

    def _say(self, final: bool) -> str:
        at = self._held.find(OPEN)
        if at >= 0:
            self._in_calls = True
        else:
            at = len(self._held) if final else len(self._held) - _overlap(self._held)
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def _complete(self) -> list[Call]:
        found = []
        while match := _BLOCK.match(self._held):
            found.append(_parse(match[1]))
            self._held = self._held[match.end() :]
        return found


def _overlap(text: str) -> int:
    """How many characters at the end of a text may be the beginning of a call."""
    return next((size for size in range(min(len(OPEN) - 1, len(text)), 0, -1) if text.endswith(OPEN[:size])), 0)


def _parse(block: str) -> Call:
    """A call from its JSON, which the grammar guarantees; the arguments stay as they were written."""
    name = json.loads(block)["name"]
    start = block.index('"arguments": ', block.index(json.dumps(name)) + len(json.dumps(name))) + len('"arguments": ')
    return Call(name, block[start : block.rindex("}")])
