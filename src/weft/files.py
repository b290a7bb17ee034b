"""Files written whole or not at all, and text read with an error a person can act on."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.errors import UserError


def cache_home() -> Path:
    """The cache folder: $WEFT_HOME, or ~/.cache/weft."""
    return Path(os.environ.get("WEFT_HOME") or "~/.cache/weft").expanduser().absolute()


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Replace `path` with `content` in one step: a reader, or a crash, sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the place of `path` when the block ends without an exception.

    An existing folder at `path` is replaced only then; after an exception it is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.chmod(temporary, 0o755)
    try:
        yield temporary
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / "was")
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_text(path: str | Path, what: str = "text") -> str:
    """Read a UTF-8 file; raises UserError where it is missing, a folder, empty or not UTF-8."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give the path of a {what} file.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the path of a {what} file.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); convert it to UTF-8 and try again."
        ) from None
    if not text:
        raise UserError(f"{path} is empty; give a {what} file with content.")
    return text


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
