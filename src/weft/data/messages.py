"""Messages of a record, checked: who speaks, in which order, and that everything said is text."""

from collections.abc import Mapping, Sequence
from typing import Any

from weft.data.record_kinds import Message
from weft.data.rows import KINDS, text_of
from weft.errors import UserError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
# Who may speak after whom; "" is the beginning.
_BEFORE = {
    "system": ("", "system", "developer"),
    "developer": ("", "system", "developer"),
    "user": ("", "system", "developer", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def messages_of(value: Any, where: str, after: str = "") -> tuple[Message, ...]:
    """A list of messages in OpenAI's form (role, content) or ShareGPT's (from, value) as messages with `role` and `content`.

    after   the role that spoke before the first of them: "user" for answers that are messages.
    Raises UserError naming the message for what is no list, an unknown role, one out of order, and content that is empty or no string.
    """
    if not isinstance(value, list | tuple):
        kind = KINDS.get(type(value), type(value).__name__)
        raise UserError(f"{where} is {kind}, not a list of messages; give a list of objects with `role` and `content`.")
    if not value:
        raise UserError(f"{where} is an empty list; give at least one message, or drop the record.")
    messages = tuple(_message(entry, f"{where}, message {number}") for number, entry in enumerate(value, 1))
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if after not in _BEFORE[role]:
            order = f"after {after}" if after else "at the beginning"
            raise UserError(
                f"{where}, message {number} is from {role} {order}; after an optional system message, user and assistant take turns (tools "
                "answer the assistant): mend the order, or join messages of one role."
            )
        after = role
    return messages


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} is {KINDS.get(type(entry), type(entry).__name__)}, not an object; give it `role` and `content`.")
    kept = {str(name): value for name, value in entry.items() if value is not None}
    sharegpt = "from" in kept and "role" not in kept
    speaker, said = ("from", "value") if sharegpt else ("role", "content")
    role = text_of(kept.pop(speaker, None), f"{where}: '{speaker}'").lower()
    role = SHAREGPT.get(role, role) if sharegpt else role
    if role not in ROLES:
        known = (*ROLES, *SHAREGPT) if sharegpt else ROLES
        raise UserError(f"{where}: '{speaker}' is '{role}'.{nearest(role, known)} Allowed: {', '.join(known)}.")
    content = kept.pop(said, None)
    if content is None and role == "assistant" and kept.get("tool_calls"):
        return {"role": role, "content": None, **kept}
    if isinstance(content, list):
        raise UserError(f"{where}: '{said}' is a list of parts; Weft reads text alone: join the parts' text into one string.")
    return {"role": role, "content": text_of(content, f"{where}: '{said}'", may_be_empty=role in ("system", "developer", "tool")), **kept}


def common_beginning(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages two conversations share from their beginning."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
