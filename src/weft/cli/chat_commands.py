"""What can be typed in a chat besides messages: lines that begin with a slash."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weft.cli.console import say
from weft.errors import UserError, unknown

if TYPE_CHECKING:
    from weft.engine import SamplingParams
    from weft.engine.conversation import Conversation


class Leave(Exception):
    """Raised to end the chat."""


@dataclasses.dataclass
class Session:
    """A chat as commands see it."""

    model: str
    conversation: "Conversation"
    params: "SamplingParams"

    def describe(self) -> str:
        """The settings that are not at rest, as `temp 0.7, top-p 0.9`."""
        resting = type(self.params)()
        values = {name: getattr(self.params, field) for name, (field, _) in SETTINGS.items()}
        shown = {n: v for n, v in values.items() if n in ("temp", "max-tokens") or v != getattr(resting, SETTINGS[n][0])}
        return ", ".join(f"{name} {_show(value)}" for name, value in shown.items())


# name -> (field of SamplingParams, how its value is read)
SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temp": ("temperature", float),
    "top-k": ("top_k", int),
    "top-p": ("top_p", float),
    "min-p": ("min_p", float),
    "repetition-penalty": ("repetition_penalty", float),
    "presence-penalty": ("presence_penalty", float),
    "frequency-penalty": ("frequency_penalty", float),
    "seed": ("seed", lambda text: None if text == "none" else int(text)),
    "max-tokens": ("max_tokens", int),
    "stop": ("stop", lambda text: () if text == "none" else (text.replace("\\n", "\n"),)),
}


def _show(value: object) -> str:
    return " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)


def set_(session: Session, rest: str) -> None:
    """/set NAME VALUE  change a setting (temp, top-k, top-p, min-p, seed, max-tokens …); /set alone shows them."""
    name, _, value = rest.partition(" ")
    if not name:
        say(session.describe())
        return
    name = name.replace("_", "-").lstrip("-")
    name = {"temperature": "temp"}.get(name, name)
    if name not in SETTINGS:
        raise unknown("setting", name, SETTINGS)
    field, read = SETTINGS[name]
    try:
        parsed = read(value.strip())
    except ValueError:
        raise UserError(f"{name} is {value.strip()!r}; give a number, as in /set {name} {1 if read is int else 0.7}.") from None
    session.params = dataclasses.replace(session.params, **{field: parsed})
    say(session.describe())


def system(session: Session, rest: str) -> None:
    """/system TEXT     replace the system prompt; /system alone takes it away."""
    session.conversation.set_system(rest or None)
    say("The system prompt is set." if rest else "There is no system prompt now.")


def reset(session: Session, rest: str) -> None:
    """/reset           forget what was said; the system prompt stays."""
    session.conversation.reset()
    say("Forgotten.")


def save(session: Session, rest: str) -> None:
    """/save FILE       write the conversation as JSON."""
    if not rest:
        raise UserError("/save needs a file name, as in /save talk.json.")
    session.conversation.save(rest)
    say(f"Saved to {rest}.")


def load(session: Session, rest: str) -> None:
    """/load FILE       go on with a saved conversation."""
    if not rest:
        raise UserError("/load needs a file name, as in /load talk.json.")
    session.conversation.load(rest)
    say(f"{len(session.conversation.messages)} messages from {rest}.")


def help_(session: Session, rest: str) -> None:
    """/help            this list."""
    for command in COMMANDS.values():
        say(command.__doc__ or "")
    say("A line that ends with \\ goes on in the next one. Ctrl-C ends an answer, Ctrl-D the chat.")


def quit_(session: Session, rest: str) -> None:
    """/quit            leave."""
    raise Leave


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "/set": set_,
    "/system": system,
    "/reset": reset,
    "/save": save,
    "/load": load,
    "/help": help_,
    "/quit": quit_,
}
ALIASES = {"/exit": "/quit", "/?": "/help", "/bye": "/quit"}


def run_command(session: Session, line: str) -> None:
    """Carry out a line that begins with a slash. Raises UserError for an unknown one, Leave to end the chat."""
    name, _, rest = line.partition(" ")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    COMMANDS[name](session, rest.strip())
