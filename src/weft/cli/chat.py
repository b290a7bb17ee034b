"""`weft chat`: talk with a model."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from weft.cli.chat_commands import COMMANDS, Leave, Session, run_command
from weft.cli.console import emit_json, say
from weft.cli.options import EngineOptions, SamplingOptions, with_groups
from weft.cli.pace import Pace
from weft.errors import UserError

TEMPERATURE = 0.7


@with_groups
def chat(
    model: str = typer.Argument("smollm2-135m", help="A pulled model's name, a model folder or a GGUF file."),
    system: str | None = typer.Option(None, "--system", help="The system prompt."),
    max_tokens: int = typer.Option(1024, "--max-tokens", help="Most tokens of an answer."),
    sampling: SamplingOptions = SamplingOptions(),
    run: EngineOptions = EngineOptions(),
    json: bool = typer.Option(False, "--json", help="Print the conversation as one JSON object at the end."),
) -> None:
    """Talk with a model. /help lists what else can be typed; Ctrl-C ends an answer, Ctrl-D the chat."""
    from weft.engine.conversation import Conversation
    from weft.engine.open import generation_defaults, open_engine

    defaults = {"max_tokens": max_tokens}
    recommended = {"temperature": TEMPERATURE} | generation_defaults(model)
    settings = sampling.params(**(defaults | recommended))
    engine = open_engine(model, run.device, run.dtype, 1, True, None, run.draft, run.fast, run.int8_state, run.one_adapter)
    conversation = Conversation(engine, system)
    session = Session(model, conversation, settings)
    talk = _Talk(session, sys.stderr if json else sys.stdout)
    if sys.stdin.isatty():
        say(f"{model}: {session.describe()}. /help for help, Ctrl-D to leave.")
    _converse(session, talk)
    if json:
        emit_json({"model": model, "messages": conversation.messages, "tokens_per_s": talk.tokens_per_s})


def _converse(session: Session, talk: "_Talk") -> None:
    for text in _lines():
        try:
            if text.startswith("/"):
                run_command(session, text)
            elif text.strip():
                talk.answer(text)
        except Leave:
            return
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            say(f"weft: {error}")


class _Talk:
    """Shows answers as they come, and keeps count."""

    def __init__(self, session: Session, out: Any) -> None:
        self.session, self.out = session, out
        self.paces: list[Pace] = []

    def answer(self, text: str) -> None:
        pace, shown = Pace(), 0
        with _interruptible() as interrupted:
            for event in self.session.conversation.ask(text, self.session.params, interrupted):
                pace.count(pace.tokens == 0)
                print(event.text, end="", file=self.out, flush=True)
                shown += len(event.text)
        result = self.session.conversation.result
        assert result is not None
        print(result.text[shown:], file=self.out, flush=True)  # an answer cut short may end in text that was held back
        pace.prompt_tokens = result.prompt_tokens
        self.paces.append(pace)
        why = {"length": ", cut at the limit", "cancelled": ", interrupted"}.get(result.finish_reason, "")
        say(f"[{pace.line()}{why}]")

    @property
    def tokens_per_s(self) -> float:
        """Of the last answer."""
        return self.paces[-1].tokens_per_s if self.paces else 0.0


def _lines() -> Iterator[str]:
    """What is typed, line by line; a line that ends with a backslash goes on in the next one."""
    parts: list[str] = []
    for line in _typed() if sys.stdin.isatty() else _piped():
        more = line.endswith("\\")
        parts.append(line.removesuffix("\\"))
        if not more:
            yield "\n".join(parts)
            parts = []
    if parts:
        yield "\n".join(parts)


def _piped() -> Iterator[str]:
    try:
        for line in sys.stdin.buffer:
            yield line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 (byte {error.start} of a line); convert it to UTF-8.") from None


def _complete(text: str, state: int) -> str | None:
    """The command number `state` that begins like this, as readline asks for it."""
    fitting = [name for name in COMMANDS if name.startswith(text)]
    return fitting[state] if state < len(fitting) else None


def _typed() -> Iterator[str]:
    try:
        import readline  # editing and history for input()
    except ImportError:  # Windows has no readline; its console edits lines itself
        pass
    else:
        readline.set_completer_delims("")
        readline.set_completer(_complete)
        readline.parse_and_bind("tab: complete")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit to leave)")


@contextmanager
def _interruptible() -> "Iterator[Any]":
    """Within, Ctrl-C sets a flag instead of stopping the program; yields the function that reads it."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
