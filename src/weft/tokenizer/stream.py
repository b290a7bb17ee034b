"""Text from ids one at a time, as they are generated, without ever showing half a character."""

import codecs
from collections.abc import Sequence
from typing import Protocol


class Vocabulary(Protocol):
    """What decoding needs to know of a vocabulary; ids come here already without those that are not shown."""

    @property
    def exact(self) -> bool: ...

    @property
    def drops_first_space(self) -> bool: ...

    def of(self, index: int) -> bytes: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class StreamDecoder:
    """Decodes a growing list of ids; what `push` and `finish` return, put together, is what decoding the whole list gives.

    A token may end inside a UTF-8 character: its bytes wait until the character is complete. Bytes that are no UTF-8 become U+FFFD,
    one for each maximal invalid part (Unicode 15, section 3.9, table 3-8).

    whole_text  the ids begin a text: a first space that the vocabulary only marks a word with is left out.
    """

    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int] = frozenset(), whole_text: bool = True) -> None:
        self._vocabulary = vocabulary
        self._hidden = hidden
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = whole_text and vocabulary.drops_first_space
        # For vocabularies decoded by the library: ids[shown_from:] is all that still influences the text to come, and the
        # text of ids[shown_from:shown_to] has been returned.
        self._ids: list[int] = []
        self._shown = 0

    def push(self, index: int) -> str:
        """Text that one more id completes; often empty in the middle of a character."""
        if index in self._hidden:
            return ""
        return self._push_bytes(self._vocabulary.of(index)) if self._vocabulary.exact else self._push_window(index)

    def finish(self) -> str:
        """The rest, with U+FFFD for a character whose last bytes never came."""
        if self._vocabulary.exact:
            return self._bytes.decode(b"", final=True)
        text = self._vocabulary.decode(self._ids)[len(self._vocabulary.decode(self._ids[: self._shown])) :]
        self._shown = len(self._ids)
        return text

    def _push_bytes(self, data: bytes) -> str:
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._bytes.decode(data)

    def _push_window(self, index: int) -> str:
        self._ids.append(index)
        before = self._vocabulary.decode(self._ids[: self._shown])
        text = self._vocabulary.decode(self._ids)
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        # One id of context is enough for a decoder that only asks whether a token is the first one.
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]
