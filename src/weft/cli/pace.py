"""How fast a model read and wrote."""

import time
from dataclasses import dataclass, field


@dataclass
class Pace:
    """Started with the prompt; every event that brings a token counts.

    tokens_per_s is of writing alone: tokens after each one's first over the time since the very first.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    _start: float = field(default_factory=time.perf_counter)
    _first: float | None = None
    _first_tokens: int = 0
    _last: float = 0.0

    def count(self, is_first: bool) -> None:
        """Take note of a token; `is_first` where it is the first of its continuation."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        self.tokens += 1
        self._first_tokens += is_first

    def count_whole(self, tokens: int) -> None:
        """Take note of a text that came whole, as from beam search."""
        self._last = time.perf_counter()
        self.tokens += tokens
        self._first_tokens += tokens

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return max(self._last - self._start, 0.0)

    @property
    def first_token_s(self) -> float:
        """From the start to the first token."""
        return 0.0 if self._first is None else self._first - self._start

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second; over the whole time where no continuation has more than one."""
        later, writing = self.tokens - self._first_tokens, self._last - (self._first or 0.0)
        if later > 0 and writing > 0:
            return later / writing
        return self.tokens / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """One line for people."""
        first = "" if self._first is None else f", the first after {self.first_token_s:.2f} s"
        return f"{self.prompt_tokens} prompt tokens; {self.tokens} tokens{first}, {self.tokens_per_s:.1f} tokens/s"
