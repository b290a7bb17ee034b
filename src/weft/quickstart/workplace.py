"""The folder of a job: what lies where, and who may write."""

import json
import shutil
from pathlib import Path

import filelock

from weft import __version__
from weft.errors import UserError
from weft.files import atomic_write

MARK = "weft-quickstart"
REPORT, PAGE, PICTURE = "quickstart.json", "quickstart.md", "quickstart.png"


class Workplace:
    """A folder that is empty or holds an earlier quickstart, held by this process until `release`.

    base/, model/, reinforced/            the model as pretrained, fine-tuned, and reinforced
    quickstart.json, .md, .png            the report
    work/                                 everything needed to carry on: corpus, tokenizer, shards, runs, and a record a step

    restart   throw the earlier one's work away. Raises UserError where the folder holds something else or is in use.
    """

    def __init__(self, out: Path, restart: bool = False) -> None:
        check_out(out)
        self.out, self.work = out, out / "work"
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.work / ".lock", timeout=0)
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another quickstart is at work in {out}; wait until it has ended, or give another --out.") from None
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error.strerror}); give another --out.") from None
        if restart:
            for entry in self.work.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != ".lock":
                    entry.unlink()
        atomic_write(self.mark, json.dumps({"format": MARK, "version": __version__}) + "\n")

    @property
    def mark(self) -> Path:
        return _mark(self.out)

    @property
    def corpus(self) -> Path:
        return self.work / "corpus"

    @property
    def pairs(self) -> Path:
        return self.work / "pairs"

    @property
    def tokenizer(self) -> Path:
        return self.work / "tokenizer"

    @property
    def records(self) -> Path:
        return self.work / "steps"

    @property
    def base(self) -> Path:
        return self.out / "base"

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def reinforced(self) -> Path:
        return self.out / "reinforced"

    @property
    def prompts(self) -> Path:
        return self.work / "prompts.jsonl"

    def run_folder(self, name: str, key: str) -> Path:
        """The folder of a training run under a key; those under other keys, which nobody will carry on, are removed."""
        folder = self.work / f"{name}-{key[:12]}"
        for other in self.work.glob(f"{name}-*"):
            if other != folder:
                shutil.rmtree(other)
        return folder

    def release(self) -> None:
        self._lock.release()


def check_out(out: Path) -> None:
    """Raise UserError where a job must not write: a file, or a folder with things of somebody else. Changes nothing."""
    if out.is_file():
        raise UserError(f"{out} is a file; give --out the name of a folder.")
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise UserError(f"{out} holds other files, which quickstart leaves alone; give --out a new or empty folder.")


def _mark(out: Path) -> Path:
    return out / "work" / "quickstart.json"


def _is_ours(out: Path) -> bool:
    """Whether there is an earlier job's mark, or its report where `work` was deleted."""
    return any(_has_mark(path) for path in (_mark(out), out / REPORT))


def _has_mark(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text("utf-8")).get("format") == MARK)
    except (OSError, ValueError, AttributeError):
        return False
