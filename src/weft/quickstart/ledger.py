"""What a run has already done, so that the same command carries on where it was stopped.

A step is done when its record carries the key it would have now: a hash of its settings and of the keys before it. A change of the
corpus or of an option thus repeats the steps that depend on it and no others.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weft import __version__
from weft.files import atomic_write


def content_key(*facts: Any) -> str:
    """Hexadecimal SHA-256 of JSON-ready facts and of Weft's version."""
    return hashlib.sha256(json.dumps([__version__, *facts], sort_keys=True, default=str).encode()).hexdigest()


class Ledger:
    """Results of finished steps, one JSON file a step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, step: str, key: str, outputs: Sequence[Path] = ()) -> dict[str, Any] | None:
        """The result of a step done under this key whose outputs all exist, else None."""
        try:
            record = json.loads((self.folder / f"{step}.json").read_text("utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        if not isinstance(record, dict) or record.get("key") != key or not all(path.exists() for path in outputs):
            return None
        result = record.get("result")
        return result if isinstance(result, dict) else None

    def run(self, step: str, key: str, work: Callable[[], dict[str, Any]], outputs: Sequence[Path] = ()) -> tuple[dict[str, Any], bool]:
        """The result of a step and whether it was done before; `seconds` in it is the time the step took when it was done.

        work   does the step and returns a JSON-ready result; it is recorded only when it returns.
        """
        known = self.find(step, key, outputs)
        if known is not None:
            return known, True
        started = time.perf_counter()
        result = work()
        result = {**result, "seconds": result.get("seconds", round(time.perf_counter() - started, 3))}
        atomic_write(self.folder / f"{step}.json", json.dumps({"key": key, "result": result}, indent=1) + "\n")
        return result, False
