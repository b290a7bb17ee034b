"""The texts that a model is tried on: prose, code, other scripts, a single token, a long one, and the user's own."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.errors import UserError
from weft.files import read_text
from weft.spec import ModelSpec
from weft.tokenizer import Tokenizer

PROSE = "The river had risen in the night, and by morning the lower path was gone. Nobody in the village was surprised: it had been"
CODE = "def merge(left, right):\n    result = []\n    while left and right:\n        if left[0] <= right[0]:\n            result.append("
NON_ASCII = "Ünïcödé naïveté — 你好，世界。Привет, мир! مرحبا 🙂👩‍👩‍👧 ∑ᵢ xᵢ² = "
QUESTION = "Name three rivers, and say in one sentence where each of them ends."
_LONG = "On day {day} the log reads: wind from the {wind}, {count} boats out, water at {level} cm. "
_WINDS = ("north", "east", "south-west", "south")


@dataclass(frozen=True)
class Prompt:
    """A text in tokens; `text` is what it was, or how it was made, for messages."""

    text: str
    ids: tuple[int, ...]

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 24 else f"{self.text[:23]}…"
        return repr(shown)


def built_in(tokenizer: Tokenizer | None, spec: ModelSpec, new_tokens: int, most: int) -> list[Prompt]:
    """Prompts that leave room for `new_tokens` in the model's context, the long one as close to `most` tokens as that allows.

    Without a tokenizer they are random ids.
    """
    room = max(1, spec.context - new_tokens)
    if tokenizer is None:
        lengths = sorted({1, min(5, room), min(33, room), min(most, room)})
        return [Prompt(f"{length} random ids", _random(spec.vocab, length)) for length in lengths]
    prompts = [_cut(tokenizer, text, room) for text in (PROSE, CODE, NON_ASCII)]
    single = tokenizer.encode("A", bos=False)[:1]
    prompts.append(Prompt(tokenizer.decode(single), tuple(single)))
    if tokenizer.chat_template is not None:
        with contextlib.suppress(UserError):  # a template may want more than a question
            prompts.append(Prompt(QUESTION, tuple(tokenizer.apply_chat([{"role": "user", "content": QUESTION}])[:room])))
    lines = [_LONG.format(day=day, wind=_WINDS[day % 4], count=day * 7 % 31, level=120 + day * day % 97) for day in range(1, most)]
    prompts.append(_cut(tokenizer, "".join(lines[: most // 8 + 1]), min(most, room)))
    return prompts


def read_prompts(path: Path, tokenizer: Tokenizer | None, spec: ModelSpec, new_tokens: int) -> list[Prompt]:
    """Prompts of a file: one a line, or in a .jsonl file the `prompt` or `text` of each line.

    Raises UserError for a file without prompts, or with one too long for the context.
    """
    if tokenizer is None:
        raise UserError(f"{path} holds texts, but this model has no tokenizer beside its weights; leave --prompts out.")
    prompts = []
    for number, text in _texts(path):
        ids = tokenizer.encode(text)
        if not 0 < len(ids) <= spec.context - new_tokens:
            raise UserError(
                f"{path}, line {number} has {len(ids)} tokens; the model's context of {spec.context} has room for 1 to "
                f"{spec.context - new_tokens} beside the {new_tokens} to be generated. Shorten the line or take it out."
            )
        prompts.append(Prompt(text, tuple(ids)))
    if not prompts:
        raise UserError(f"{path} has no prompts; give one a line.")
    return prompts


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(path, "prompts").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield number, line
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not valid JSON: {error}. Give one object a line.") from None
        text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text:
            raise UserError(f"{path}, line {number} has no text under 'prompt' or 'text'; give one there.")
        yield number, text


def _cut(tokenizer: Tokenizer, text: str, room: int) -> Prompt:
    return Prompt(text, tuple(tokenizer.encode(text)[:room]))


def _random(vocab: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist())
