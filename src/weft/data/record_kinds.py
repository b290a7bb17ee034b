"""What records of tuning data are, whatever file and column names they came from.

A `Said` is what a model reads or answers: plain text, or messages that a chat template has to render.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]  # role, content, and what a template reads besides
Said = str | tuple[Message, ...]


@dataclass(frozen=True)
class Conversation:
    """Messages of which the assistant's are trained on. `origin` is "file:row", for messages to people, here and below."""

    messages: tuple[Message, ...]
    origin: str
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A prompt that is read, and what is trained on after it; both text, or both messages."""

    prompt: Said
    completion: Said
    origin: str
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which people liked the first better, by `margin` where they said how much (Llama 2, section 3.2.2)."""

    prompt: Said
    chosen: Said
    rejected: Said
    origin: str
    margin: float = 0.0
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """A text and its class, as the file has it."""

    text: str
    label: str | int
    origin: str


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, and the record's other columns, from which a judge may know the answer."""

    prompt: Said
    origin: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class PlainText:
    """Text without a prompt, all of it trained on."""

    text: str
    origin: str


Record = Conversation | Completion | Preference | Labelled | Prompt | PlainText
