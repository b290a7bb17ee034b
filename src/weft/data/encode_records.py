"""Records as token ids, each with whether it is trained on.

What an assistant's turn adds is found by rendering the chat template twice, up to the turn with the generation prompt and through the
turn: so a stock template serves, without marks of its own. Trained is what a model will have to write after that prompt, up to and with
the token that ends the turn.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from weft.data.encoder import choose_marks, join_pair
from weft.data.record_kinds import Completion, Conversation, Labelled, Message, PlainText, Preference, Record, Said
from weft.errors import UserError
from weft.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """ids and, for each, whether it is a target; `cut` tokens more did not fit in the length."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    cut: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        return sum(self.trained)


@dataclass(frozen=True)
class EncodedPair:
    """Two answers to one prompt, each with the prompt before it."""

    chosen: Encoded
    rejected: Encoded
    margin: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.chosen.num_tokens + self.rejected.num_tokens


@dataclass(frozen=True)
class _Turn:
    """Message `index`, as a model would write it: characters start … stop - 1 of `text`, the end token included."""

    index: int
    text: str
    start: int
    stop: int

    def stands_in(self, text: str) -> bool:
        """Whether a longer conversation still has the turn, and all before it, as it was when it was written."""
        return text[: self.stop] == self.text[: self.stop]


@dataclass(frozen=True)
class _Answer:
    """What comes after a prompt; in an answer of several messages, those of tools and users are not trained on."""

    ids: Sequence[int]
    trained: Sequence[bool]


class RecordEncoder:
    """Records through a tokenizer and its chat template.

    length   the most ids of a text; None sets no bound. A conversation is cut at its end. A prompt gives way from its left to the answer,
             down to half of the length; then the answer is cut at its end. Text without a prompt becomes several.
    Every method raises UserError, which begins with the record's origin, for what cannot be trained on: a template that is missing or that
    refuses the messages, a turn without an end token, special tokens spelled out in what is said, and records of which no token that is
    trained on fits in the length.
    """

    def __init__(self, tokenizer: Tokenizer, length: int | None = None) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.marks = choose_marks(tokenizer)

    def encode(self, record: Record) -> list[Encoded]:
        """What a language model learns from a record: see the methods for each kind."""
        if isinstance(record, Conversation):
            return self.conversations(record)
        if isinstance(record, Completion):
            return [self.completion(record)]
        assert isinstance(record, PlainText)
        return self.texts(record)

    def conversation(self, record: Conversation) -> Encoded:
        """A whole conversation up to its last answer, trained on every answer that it holds as the model would have written it.

        All of them for most templates. Some rewrite earlier turns (they drop what was thought, or end them in another way), and what they
        make of those is no example of an answer: `conversations` has all.
        """
        return next(self._conversations(record.messages, record.tools, 0, record.origin))

    def conversations(self, record: Conversation) -> list[Encoded]:
        """A conversation so that every answer is trained on once: one text, and for each answer that the template rewrites later on, one
        more, which ends with it.
        """
        return list(self._conversations(record.messages, record.tools, 0, record.origin))

    def completion(self, record: Completion) -> Encoded:
        """A prompt and what is trained on after it, with the end token: of text the tokenizer's, of messages the template's."""
        prompt, answer = self._parts(record.prompt, record.completion, record.tools, record.origin)
        return self._joined(prompt, answer, self._room(prompt, [answer]), record.origin)

    def preference(self, record: Preference) -> EncodedPair:
        """Both answers of a pair, their common prompt cut alike."""
        pair = [self._parts(record.prompt, answer, record.tools, record.origin) for answer in (record.chosen, record.rejected)]
        cut = min(len(prompt) - self._room(prompt, [answer for _, answer in pair]) for prompt, _ in pair)
        chosen, rejected = (self._joined(prompt, answer, len(prompt) - cut, record.origin) for prompt, answer in pair)
        return EncodedPair(chosen, rejected, record.margin)

    def labelled(self, record: Labelled) -> Encoded:
        """A text and the end token, at which its class is read (Radford et al. 2018, section 3.2); all of it trained on. A text that is too
        long is cut before the end token, which stays."""
        ids = self._plain(record.text, record.origin)
        kept = ids if self.length is None or len(ids) <= self.length else [*ids[: self.length - 1], ids[-1]]
        return self._checked(kept, [True] * len(kept), len(ids), record.origin)

    def texts(self, record: PlainText) -> list[Encoded]:
        """A text and the end token, all of it trained on: in as many pieces as fit in the length, each of which begins with the last token
        of the one before, to read it."""
        ids = self._plain(record.text, record.origin)
        step = len(ids) if self.length is None else max(1, self.length - 1)
        pieces = [ids[start : start + step + 1] for start in range(0, max(1, len(ids) - 1), step)]
        return [self._checked(piece, [True] * len(piece), len(piece), record.origin) for piece in pieces]

    def prompt(self, said: Said, origin: str = "the prompt", tools: Sequence[Message] = ()) -> tuple[int, ...]:
        """What is read before an answer: text, or messages and the generation prompt. Its left end gives way to the length."""
        if isinstance(said, str):
            self._check_plain(said, origin)
            ids = [*self._bos, *self.tokenizer.encode_batch([said])[0]]
        else:
            self._check_messages(said, origin)
            ids = self.tokenizer.encode_cut(self._render(said, tools, True, origin), ())[0]
        return tuple(self._left_cut(ids, len(ids) if self.length is None else self.length))

    # Conversations.

    def _conversations(self, messages: Sequence[Message], tools: Sequence[Message], first: int, origin: str) -> Iterator[Encoded]:
        """The texts of `conversations`, the whole one first; only answers from message `first` on are trained on."""
        self._check_messages(messages, origin)
        turns = [self._turn(messages, index, tools, origin) for index in _answers(messages) if index >= first]
        if not turns:
            raise UserError(f"{origin}: there is no assistant message, so there is nothing to learn; add the answer, or drop the record.")
        whole = turns[-1].text
        yield self._marked(whole, [turn for turn in turns if turn.stands_in(whole)], origin)
        for turn in turns:
            if not turn.stands_in(whole):
                yield self._joined(*self._split([turn]), None, origin)

    def _turn(self, messages: Sequence[Message], index: int, tools: Sequence[Message], origin: str) -> _Turn:
        """Where an answer stands in the conversation that ends with it."""
        asked = self._render(messages[:index], tools, True, origin)
        text = self._render(messages[: index + 1], tools, False, origin)
        if not text.startswith(asked):
            shared = len("".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, asked, strict=False))))
            raise UserError(
                f"{origin}: before message {index + 1} the chat template's generation prompt goes on with {asked[shared:][:40]!r}, which "
                "it does not write where the answer is there; a model trained so would not know its own prompt: use another template."
            )
        end = self._ends.search(text, len(asked)) if self._ends else None
        if end is None:
            raise UserError(
                f"{origin}: the chat template writes no end token after message {index + 1} (it ends with {text[-40:]!r}), so the model "
                f"would not learn to stop; use a template that ends an answer with one of {self._end_names}."
            )
        said = messages[index].get("content")
        if isinstance(said, str) and "".join(said.split()) not in "".join(text[len(asked) : end.end()].split()):
            raise UserError(
                f"{origin}: of message {index + 1} the chat template writes {text[len(asked) : end.end()][:60]!r} and leaves out a part of "
                "what is said; take that part out, or use another template."
            )
        return _Turn(index, text, len(asked), end.end())

    @cached_property
    def _end_tokens(self) -> list[str]:
        return [name for token in self.tokenizer.eos_ids if (name := self.tokenizer.token(token))]

    @cached_property
    def _ends(self) -> re.Pattern[str] | None:
        return re.compile("|".join(map(re.escape, self._end_tokens))) if self._end_tokens else None

    @property
    def _end_names(self) -> str:
        return ", ".join(self._end_tokens) or "the tokenizer's end tokens, of which it has none"

    def _render(self, messages: Sequence[Message], tools: Sequence[Message], answer: bool, origin: str) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{origin}: the record is made of messages, but the model's tokenizer has no chat template to write them with; take a "
                "model that has one, name one (data.chat_template: plain), or write the records as text (prompt, completion)."
            )
        try:
            return self.tokenizer.render_chat(messages, answer, tools or None)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None

    def _marked(self, text: str, turns: Sequence[_Turn], origin: str) -> Encoded:
        """A whole conversation with its answers marked, cut at its end."""
        ids, places = self.tokenizer.encode_cut(text, [place for turn in turns for place in (turn.start, turn.stop)])
        trained = [False] * len(ids)
        for start, stop in zip(places[::2], places[1::2], strict=True):
            trained[start:stop] = [True] * (stop - start)
        return self._checked(ids, trained, len(ids), origin)

    def _split(self, turns: Sequence[_Turn]) -> tuple[list[int], _Answer]:
        """The ids before the first of some turns, and those from there on to the end of the last."""
        ids, places = self.tokenizer.encode_cut(turns[-1].text, [place for turn in turns for place in (turn.start, turn.stop)])
        first, last = places[0], places[-1]
        trained = [False] * (last - first)
        for start, stop in zip(places[::2], places[1::2], strict=True):
            trained[start - first : stop - first] = [True] * (stop - start)
        return ids[:first], _Answer(ids[first:last], trained)

    # Prompts and answers.

    def _parts(self, prompt: Said, answer: Said, tools: Sequence[Message], origin: str) -> tuple[list[int], _Answer]:
        """The ids of a prompt, and an answer to it."""
        if isinstance(prompt, str) and isinstance(answer, str):
            for said in (prompt, answer):
                self._check_plain(said, origin)
            before, joint, alone = self.tokenizer.encode_batch([prompt, prompt + answer, answer])
            ids = [*join_pair(before, joint, alone), self._eos(origin)]
            return [*self._bos, *before], _Answer(ids, [True] * len(ids))
        assert not isinstance(prompt, str), "read_records gives prompt and answer both as text or both as messages"
        assert not isinstance(answer, str), "read_records gives prompt and answer both as text or both as messages"
        messages = (*prompt, *answer)
        self._check_messages(messages, origin)
        turns = [self._turn(messages, index, tools, origin) for index in _answers(messages) if index >= len(prompt)]
        if not all(turn.stands_in(turns[-1].text) for turn in turns):
            raise UserError(
                f"{origin}: the answer is {len(answer)} messages, of which the chat template rewrites one later on; write the earlier ones "
                "into the prompt."
            )
        return self._split(turns)

    def _room(self, prompt: Sequence[int], answers: Sequence[_Answer]) -> int:
        """How many ids of a prompt are kept: what the longest answer leaves, but at least half of the length."""
        if self.length is None:
            return len(prompt)
        return min(len(prompt), max(self.length - max(len(answer.ids) for answer in answers), self.length // 2))

    def _left_cut(self, ids: Sequence[int], keep: int) -> Sequence[int]:
        """The last ids of a text; a BOS at its beginning stays."""
        if len(ids) <= keep:
            return ids
        bos = ids[:1] if keep > 1 and ids[0] == self.tokenizer.bos_id else ids[:0]
        return [*bos, *ids[len(ids) - keep + len(bos) :]]

    def _joined(self, prompt: Sequence[int], answer: _Answer, keep: int | None, origin: str) -> Encoded:
        """A prompt, of which the last `keep` ids stay (None: what suits the answer), and the answer."""
        keep = self._room(prompt, [answer]) if keep is None else keep
        kept = self._left_cut(prompt, max(0, keep))
        whole = len(prompt) + len(answer.ids)
        return self._checked([*kept, *answer.ids], [*(False for _ in kept), *answer.trained], whole, origin)

    def _plain(self, text: str, origin: str) -> list[int]:
        """The ids of a text and the end token."""
        self._check_plain(text, origin)
        return [*self._bos, *self.tokenizer.encode_batch([text])[0], self._eos(origin)]

    @property
    def _bos(self) -> list[int]:
        return [] if self.marks.bos is None else [self.marks.bos]

    def _eos(self, origin: str) -> int:
        if self.marks.eos is None:
            raise UserError(f"{origin}: the tokenizer has no end token, so a model would not learn to stop; use a tokenizer that has one.")
        return self.marks.eos

    def _checked(self, ids: Sequence[int], trained: Sequence[bool], whole: int, origin: str) -> Encoded:
        """Cut to the length; raises UserError where nothing is left to learn: the first token of a text is never a target."""
        length = len(ids) if self.length is None else self.length
        kept, flags = tuple(ids[:length]), (False, *trained[1:length])
        if not any(flags):
            if any(trained[1:]):
                first = list(trained).index(True) + 1
                raise UserError(
                    f"{origin}: what is trained on begins at token {first}, beyond the length of {length}; raise the length to {whole} for "
                    "all of the record, or drop it."
                )
            raise UserError(f"{origin}: no token of the record is trained on; give it an answer, or drop it.")
        return Encoded(kept, flags, whole - len(kept))

    # What is said may not look like what the template writes.

    def _check_plain(self, text: str, where: str) -> None:
        token = self.tokenizer.special_in(text)
        if token is not None:
            raise UserError(
                f"{where}: the text spells out the special token {token}; take it out, or give `messages` for the chat template to write."
            )

    def _check_messages(self, messages: Sequence[Message], origin: str) -> None:
        for number, message in enumerate(messages, 1):
            for text in _texts(message):
                self._check_plain(text, f"{origin}, message {number}")


def _answers(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _texts(value: Any) -> Iterator[str]:
    """Every string within a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
