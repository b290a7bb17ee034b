"""The folder of pulled models: names, manifests, and models that are there whole or not at all. Importable without torch.

    $WEFT_HOME (default ~/.cache/weft)
      models/<name>/            the files of a model and its manifest `weft-pull.json`
      models/<name>.partial/    a pull that has not ended: taken up again by the next one, never listed or loaded
      locks/<name>.lock         held while a pull or a removal runs
      kernels/                  native code compiled for this machine (weft.kernels)

A model folder appears by one rename, after its manifest, with the size and SHA-256 of every file, was written. In folder names "/" and
":" of a model's name are "--" and "---".
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from weft.errors import UserError
from weft.files import atomic_write, cache_home

MANIFEST = "weft-pull.json"
PARTIAL = ".partial"
CHUNK = 2**20
# What is being done, the bytes done and the bytes in all.
Progress = Callable[[str, int, int], None]

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_WORD}(?:/{_WORD})?(?::{_WORD})?")


@dataclass(frozen=True)
class FileRecord:
    """A file of a pulled model: its name in the folder, its bytes and its SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Pulled:
    """A model in the cache.

    source    where it came from: "hub:org/name", "wheel:package==version" or "path:/folder".
    revision  the branch, tag or commit that was asked for, and `commit` the one it stood for; None where there is no such thing.
    date      of the pull, ISO 8601 in UTC.
    """

    name: str
    path: Path
    source: str
    revision: str | None
    commit: str | None
    date: str
    files: tuple[FileRecord, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def check_name(name: str) -> str:
    """Return `name` if a model can be kept under it; raises UserError otherwise."""
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(PARTIAL) or len(name) > 200:
        raise UserError(
            f"'{name}' cannot name a model; use letters, digits, '.', '-' and '_', one '/' as in org/name, one ':' as in org/name:Q8_0."
        )
    return name


def folder_of(name: str) -> Path:
    """Where the model of that name lies, or would."""
    return cache_home() / "models" / check_name(name).replace(":", "---").replace("/", "--")


def partial_of(name: str) -> Path:
    """Where an unfinished pull of that name lies, or would."""
    folder = folder_of(name)
    return folder.with_name(folder.name + PARTIAL)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock on a name; raises UserError where another process holds it or the cache folder cannot be written."""
    path = cache_home() / "locks" / (folder_of(name).name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder_of(name).parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another weft is at work on '{name}'; wait until it has ended.") from None
    except OSError as error:
        raise UserError(f"the cache folder {cache_home()} cannot be written ({error.strerror}); set WEFT_HOME to one that can.") from None
    try:
        yield
    finally:
        lock.release()


def find(name: str) -> Pulled | None:
    """The pulled model of that name, or None; its files are not looked at."""
    return _read(folder_of(name))


def every_model() -> list[Pulled]:
    """All pulled models by name; unfinished pulls are not among them."""
    root = cache_home() / "models"
    folders = [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []
    found = (_read(folder) for folder in folders if not folder.name.startswith(".") and not folder.name.endswith(PARTIAL))
    return sorted((model for model in found if model), key=lambda model: model.name)


def _read(folder: Path) -> Pulled | None:
    """The model in a folder by its manifest; None where there is no manifest that this version could have written."""
    try:
        data: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = tuple(FileRecord(**record) for record in data.pop("files"))
        model = Pulled(path=folder, files=files, **data)
        plain = all(Path(file.path).name == file.path and type(file.bytes) is int for file in files)
        return model if plain and folder_of(model.name).name == folder.name.removesuffix(PARTIAL) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def damaged_files(model: Pulled, hashes: bool = False, progress: Progress | None = None) -> list[str]:
    """Files of a model that are missing or of another size than the manifest says, or, with `hashes`, of other content."""
    bad = []
    for file in model.files:
        path = model.path / file.path
        size = path.stat().st_size if path.is_file() else -1
        if size != file.bytes or (hashes and digest(path, progress) != file.sha256):
            bad.append(file.path)
    return bad


def digest(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file, with progress."""
    sha, size, done = hashlib.sha256(), path.stat().st_size, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
            done += len(chunk)
            if progress:
                progress(f"checking {path.name}", done, size)
    return sha.hexdigest()


def finish(model: Pulled) -> Pulled:
    """Turn an unfinished pull, whose folder is `model.path`, into the model of that name: manifest first, then one rename."""
    wanted = {file.path for file in model.files}
    for path in model.path.iterdir():
        if path.name not in wanted:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    manifest = asdict(model)
    del manifest["path"]
    atomic_write(model.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return _move_in(model)


def recover(name: str) -> None:
    """Complete a pull that was ended between its manifest and its rename."""
    model = _read(partial_of(name))
    if model and model.name == name and find(name) is None:
        _move_in(model)


def _move_in(model: Pulled) -> Pulled:
    folder = folder_of(model.name)
    discard(folder)
    os.replace(model.path, folder)
    finished = _read(folder)
    assert finished is not None
    return finished


def discard(folder: Path) -> None:
    """Remove a folder of the cache so that it is whole until it is gone: rename, then delete."""
    root = cache_home() / "models"
    assert folder.parent == root
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        grave = Path(tempfile.mkdtemp(dir=root, prefix=".removed-"))
        os.replace(folder, grave / "was")
        shutil.rmtree(grave, ignore_errors=True)
