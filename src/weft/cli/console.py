"""What every verb prints through: people read stderr, programs read the last line of stdout."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def console() -> "Console":
    """The console for people, on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One plain line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit_json(value: Any) -> None:
    """One JSON value as the last line of stdout."""
    sys.stderr.flush()
    print(json.dumps(value, ensure_ascii=False), flush=True)


def progress() -> "Progress":
    """A progress display on stderr with share, time spent and time left; silent where stderr is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    out = console()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=out, transient=True, disable=not out.is_terminal)
