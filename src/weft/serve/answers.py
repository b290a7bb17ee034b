"""Answers in OpenAI's form, whole and in pieces, from the engine's events."""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from weft import __version__
from weft.engine import Event, Result, TokenLogprob
from weft.serve.errors import dumps
from weft.serve.tools import Call, CallSplitter
from weft.tokenizer import Tokenizer

FINGERPRINT = f"weft-{__version__}"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Shown:
    """A token of which text is shown, which begins at character `start` of its choice's text."""

    start: int
    entry: TokenLogprob


@dataclass(frozen=True)
class Piece:
    """What one event adds to a choice."""

    text: str
    calls: Sequence[Call]
    logprobs: Sequence[Shown]
    finish_reason: str | None


class Choice:
    """One continuation on its way to the client: its text and calls, and the log-probabilities of the tokens shown so far."""

    def __init__(self, tokenizer: Tokenizer, calls: bool, constrained: bool) -> None:
        self._ends = frozenset(tokenizer.eos_ids)
        self._decoder = tokenizer.stream_decoder(whole_text=not constrained)
        self._splitter = CallSplitter() if calls else None
        self._waiting: list[Shown] = []
        self._decoded = self._shown = 0
        self.text, self.calls, self.logprobs = "", list[Call](), list[Shown]()
        self.result: Result | None = None

    def take(self, event: Event) -> Piece:
        self._note(event)
        self._shown += len(event.text)
        text, calls = event.text, list[Call]()
        if self._splitter is not None:
            text, calls = self._splitter.push(event.text, final=event.result is not None)
        self.result = event.result
        known = [token for token in self._waiting if token.start < self._shown]
        self._waiting = self._waiting[len(known) :]
        self.text += text
        self.calls += calls
        self.logprobs += known
        return Piece(text, calls, known, None if event.result is None else self.reason)

    def _note(self, event: Event) -> None:
        # A token counts where any of its text is shown: those of a stop text, and end tokens, do not.
        if event.logprob is None or event.token is None or event.token in self._ends:
            return
        self._waiting.append(Shown(self._decoded, event.logprob))
        self._decoded += len(self._decoder.push(event.token))

    @property
    def reason(self) -> str:
        """Why it is over, in OpenAI's words."""
        assert self.result is not None
        return "tool_calls" if self.calls and self.result.finish_reason == "stop" else self.result.finish_reason


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """Token counts; a prompt that several texts continue counts once."""
    prompt = sum(result.prompt_tokens for result in results if result.index == 0)
    completion = sum(len(result.ids) for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True)
class Frame:
    """What all pieces of one answer have in common."""

    model: str
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, prefix: str, kind: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    # Log-probabilities.

    def chat_logprobs(self, tokens: Sequence[Shown]) -> dict[str, Any]:
        entries = [shown.entry for shown in tokens]
        content = [self._entry(each.id, each.logprob) | {"top_logprobs": [self._entry(*other) for other in each.top]} for each in entries]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    def _bytes(self, token: int) -> bytes:
        """A token's text; a special token's name, which no text has."""
        return self.tokenizer.token_bytes(token) or (self.tokenizer.token(token) or "").encode()

    def completion_logprobs(self, tokens: Sequence[Shown], top: bool) -> dict[str, Any]:
        best = [{self._label(token): _finite(value) for token, value in shown.entry.top} for shown in tokens]
        return {
            "tokens": [self._label(shown.entry.id) for shown in tokens],
            "token_logprobs": [_finite(shown.entry.logprob) for shown in tokens],
            "top_logprobs": best if top else None,
            "text_offset": [shown.start for shown in tokens],
        }

    def _label(self, token: int) -> str:
        """A token's text, or where it is only part of a character its bytes, as OpenAI spells them: `bytes:\\xe2\\x80`."""
        data = self._bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    # JSON has no infinity; OpenAI writes -9999 for what is out of the question.
    return max(logprob, -9999.0)


# Chat.


def chat_answer(frame: Frame, choices: Sequence[Choice], logprobs: bool) -> dict[str, Any]:
    """A `chat.completion` object."""
    written = []
    for index, choice in enumerate(choices):
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text.strip() or None, "tool_calls": [_call(call) for call in choice.calls]}
        entry = {"index": index, "message": message, "finish_reason": choice.reason}
        written.append(entry | {"logprobs": frame.chat_logprobs(choice.logprobs) if logprobs else None})
    results = [choice.result for choice in choices if choice.result is not None]
    return frame.envelope("chatcmpl", "chat.completion") | {"choices": written, "usage": usage(results)}


def _call(call: Call) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_chunks(frame: Frame, index: int, piece: Piece, first: bool, calls_before: int, logprobs: bool) -> list[dict[str, Any]]:
    """The `chat.completion.chunk` objects of a piece: the role comes first, the reason last and alone."""
    chunks = []

    def add(delta: Mapping[str, Any], entries: Sequence[Shown] = (), reason: str | None = None) -> None:
        shown = frame.chat_logprobs(entries) if logprobs and entries else None
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
        chunks.append(frame.envelope("chatcmpl", "chat.completion.chunk") | {"choices": [choice]})

    if first:
        add({"role": "assistant", "content": "", "refusal": None})
    if piece.text or (logprobs and piece.logprobs):
        add({"content": piece.text}, piece.logprobs)
    if piece.calls:
        add({"tool_calls": [{"index": calls_before + i, **_call(call)} for i, call in enumerate(piece.calls)]})
    if piece.finish_reason is not None:
        add({}, (), piece.finish_reason)
    return chunks


# Completions.


def completion_answer(frame: Frame, choices: Sequence[Choice], logprobs: int | None) -> dict[str, Any]:
    """A `text_completion` object."""
    written = []
    for index, choice in enumerate(choices):
        shown = None if logprobs is None else frame.completion_logprobs(choice.logprobs, logprobs > 0)
        written.append({"index": index, "text": choice.text, "logprobs": shown, "finish_reason": choice.reason})
    results = [choice.result for choice in choices if choice.result is not None]
    return frame.envelope("cmpl", "text_completion") | {"choices": written, "usage": usage(results)}


def completion_chunk(frame: Frame, index: int, piece: Piece, logprobs: int | None) -> dict[str, Any]:
    shown = frame.completion_logprobs(piece.logprobs, logprobs > 0) if logprobs is not None and piece.logprobs else None
    choice = {"index": index, "text": piece.text, "logprobs": shown, "finish_reason": piece.finish_reason}
    return frame.envelope("cmpl", "text_completion") | {"choices": [choice]}


# Server-sent events.


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(content) + b"\n\n"


async def with_usage(chunks: AsyncGenerator[dict[str, Any], None], include: bool) -> AsyncGenerator[bytes, None]:
    """Chunks as events. The chunk with the usage is left out unless it was asked for; then all others have it as null."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if include or "usage" not in chunk:
                yield event(chunk | {"usage": chunk.get("usage")} if include else chunk)
    yield DONE
