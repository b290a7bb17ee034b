"""What may be shown of a text while it is generated, and where a stop string ends it."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Text from ids one at a time; `weft.tokenizer.StreamDecoder` is one."""

    def push(self, index: int) -> str: ...

    def finish(self) -> str: ...


class TextStream:
    """Turns token ids into text that can be shown at once.

    Held back are characters whose last bytes have not come, and text that may yet become a stop string. Where a stop string is
    completed, the text ends before it; the first one to be completed counts, of several at once the longest, so that the result
    does not depend on how the text is cut into tokens.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        self._decoder, self._stops = decoder, stops
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, index: int) -> str:
        """The text that one more token lets show; sets `stopped` where a stop string is complete."""
        return self._show(self._decoder.push(index), final=False)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return "" if self.stopped else self._show(self._decoder.finish(), final=True)

    def _show(self, new: str, final: bool) -> str:
        text = self._held + new
        cut = _first_stop(text, self._stops)
        if cut is not None:
            self.stopped = True
            text, self._held = text[:cut], ""
        else:
            held = 0 if final else _may_become_stop(text, self._stops)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A whole text up to the stop string that is complete first, and whether there is one."""
    cut = _first_stop(text, stops)
    return (text, False) if cut is None else (text[:cut], True)


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, or None."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _may_become_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
