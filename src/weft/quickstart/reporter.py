"""How the job says where it stands, without knowing to whom."""

from typing import Protocol


class Reporter(Protocol):
    """Steps begin, advance and end, one at a time."""

    def begin(self, number: int, count: int, title: str) -> None: ...

    def advance(self, done: float, total: float | None, note: str = "") -> None:
        """`done` of `total`; a total of None says that the step is busy and its end unknown."""
        ...

    def end(self, line: str, known: bool) -> None:
        """The step's result in one line; `known` where an earlier run had done it."""
        ...

    def note(self, text: str) -> None:
        """Something a person should know."""
        ...


class Silent:
    """Nobody is told."""

    def begin(self, number: int, count: int, title: str) -> None:
        pass

    def advance(self, done: float, total: float | None, note: str = "") -> None:
        pass

    def end(self, line: str, known: bool) -> None:
        pass

    def note(self, text: str) -> None:
        pass
