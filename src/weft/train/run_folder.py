"""The folder a run writes to: what is in it, who may write, and what a kill can have left behind.

last/          the newest checkpoint: a model folder, with all that a resumed run needs
best/          the weights with the lowest held-out loss
average/       the mean of those in snapshots/, where a recipe asks for one
metrics.jsonl  a line a step and a line an evaluation
run.json       the run card; run.md the same to read; loss.png its curve
data/          what raw text was turned into
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import filelock

from weft.errors import UserError
from weft.files import atomic_write

MARK = "weft-run"
_OURS = ("last", "best", "snapshots", "average", "metrics.jsonl", "run.json", "run.md", "loss.png", "tensorboard")
_ALLOWED = {*_OURS, "data", ".lock"}


class RunFolder:
    """A folder that is empty, or holds a run of ours, held by this process until `release`.

    Raises UserError where the folder holds something else, cannot be written, or another process is training in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_out(self.path)
        self._is_new = not self.path.is_dir() or not any(self.path.iterdir())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.path / ".lock", timeout=0)
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another process is training in {self.path}; wait until it has ended, or give another out.") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); give another out.") from None
        self._tidy()
        if not self.card_path.exists():
            self.write_card({"status": "started"})

    @property
    def last(self) -> Path:
        return self.path / "last"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def card_path(self) -> Path:
        return self.path / "run.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    def write_card(self, card: dict[str, Any]) -> None:
        atomic_write(self.card_path, json.dumps({"format": MARK, **card}, indent=1, ensure_ascii=False) + "\n")

    def abandon(self) -> None:
        """Leave no trace of a run that could not begin: a folder that was not there before is taken away again."""
        if self._is_new:
            self.release()
            shutil.rmtree(self.path)

    def release(self) -> None:
        self._lock.release()

    def clear(self) -> None:
        """Throw the run away; prepared data stays."""
        for name in _OURS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.write_card({"status": "started"})

    def _tidy(self) -> None:
        """Put back a checkpoint that a kill left half swapped, and remove what it left half written."""
        for name in ("last", "best", "average"):
            for old in self.path.glob(f".{name}.old.*"):
                if (old / "was").is_dir() and not (self.path / name).exists():
                    os.replace(old / "was", self.path / name)
        scraps = [scrap for name in _OURS for scrap in self.path.glob(f".{name}.*")]
        for scrap in [*scraps, *self.path.glob("snapshots/.*.*"), *self.data.glob(".*.*")]:  # these two are made again
            if scrap.is_dir():
                shutil.rmtree(scrap)
            else:
                scrap.unlink()


def check_out(path: Path) -> None:
    """Raise UserError where a run must not write: a file, or a folder with things of somebody else. Changes nothing."""
    if path.is_file():
        raise UserError(f"out is {path}, which is a file; give a folder.")
    if not path.is_dir() or _is_run(path / "run.json"):
        return
    strange = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in _ALLOWED - {"last", "best", "snapshots", "average"} and not entry.name.startswith(".")
    )
    if strange:
        raise UserError(f"out is {path}, which holds {strange[0]} and is not a folder of an earlier run; give a new or empty one.")


def _is_run(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("format") == MARK)
    except (OSError, ValueError, AttributeError):
        return False
