"""A conversation with a model: messages, and an engine that remembers what it has read."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weft.engine.engine import Engine
from weft.engine.request import Event, Request, Result, SamplingParams
from weft.errors import UserError
from weft.files import atomic_write, read_text

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


class Conversation:
    """Messages in the order they were said, `messages[0]` the system prompt where there is one.

    By the engine's prefix cache each turn feeds only what is new, as far as the template leaves the earlier text as it was.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        assert engine.tokenizer is not None
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.messages: list[Message] = []
        self.result: Result | None = None
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt, or take it away; what was said stays."""
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *said] if text else said

    def reset(self) -> None:
        """Forget all that was said, but for the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def ask(self, text: str, params: SamplingParams, stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Say something and stream the answer, which then is the last message; `result` has it whole.

        stop  asked between steps; when it says yes, the answer ends where it is.
        Raises UserError, and leaves the conversation as it was, where the template refuses the message or the context is too short.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.apply_chat(asked)
        if len(prompt) >= self.engine.context:
            raise UserError(
                f"the conversation has {len(prompt)} tokens and the model's context is {self.engine.context}; begin anew with /reset, or "
                "say less."
            )
        number = self.engine.submit(Request(prompt, params))
        self.messages, self.result = asked, None
        try:
            while self.engine.busy and not stop():
                for event in self.engine.step():
                    self.result = event.result or self.result
                    yield event
        finally:
            cancelled = self.engine.cancel(number)
            self.result = cancelled[0] if cancelled else self.result
            assert self.result is not None
            self.messages.append({"role": "assistant", "content": self.result.text})

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON."""
        atomic_write(path, json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n")

    def load(self, path: str | Path) -> None:
        """Take over messages that `save` wrote. Raises UserError, and keeps the present ones, where the file has none."""
        text = read_text(path, "conversation")
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}. Give a file that /save wrote.") from None
        messages = data.get("messages") if isinstance(data, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise UserError(f"{path} has no list of messages with role and content; give a file that /save wrote.")
        self.messages = [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)
