"""Chat templates: messages to text through sandboxed Jinja, with the names and filters that Hugging Face templates expect."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from weft.errors import UserError


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks what the assistant writes; rendering shows its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PublicNamespace(Namespace):
    """`namespace()` that refuses underscored names, which would lead to the interpreter's own attributes."""

    def __init__(*args: Any, **values: Any) -> None:
        _refuse_private(dict(*args[1:], **values))
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private({name: value})
        super().__setitem__(name, value)


def _refuse_private(values: Mapping[str, Any]) -> None:
    for name in values:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"an underscored name, '{name}', in a namespace")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models never saw in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _PublicNamespace
    return environment


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON types alone, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise UserError(f"{where} is a {type(value).__name__}; messages and tools are made of text, numbers, lists and mappings alone.")


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(f"messages are a list of {{'role': …, 'content': …}}, not a {type(messages).__name__}.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"messages[{index}] has no 'role'; every message is a mapping with 'role' and 'content'.")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    roles: Mapping[str, str] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with a chat template.

    messages                what was said, each with `role` and `content` (and `tool_calls` and the like where the template reads them).
    add_generation_prompt   end with the beginning of the assistant's next message.
    tools                   JSON schemas of the functions the assistant may call.
    roles                   the template's `bos_token`, `eos_token` and so on.
    variables               further variables, such as `enable_thinking`.
    Raises UserError where the template is no valid Jinja, refuses the messages, or fails on them.
    """
    _check_messages(messages)
    values = {
        **(roles or {}),
        **{str(name): _plain(value, str(name)) for name, value in (variables or {}).items()},
        "messages": _plain(messages, "messages"),
        "tools": _plain(tools, "tools") if tools else None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return _compile(template).render(values)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); give a corrected template."
        ) from error
    except jinja2.exceptions.SecurityError as error:
        raise UserError(f"the chat template asks for what templates may not do ({error}); use another template.") from error
    except jinja2.exceptions.TemplateError as error:
        reason = (error.message or type(error).__name__).rstrip(".")
        raise UserError(f"the chat template refuses these messages: {reason}.") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise UserError(f"the chat template fails on these messages ({type(error).__name__}: {error}); check their fields.") from error
