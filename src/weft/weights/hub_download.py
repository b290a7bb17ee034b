"""Fetching a repo's files from the Hugging Face hub: which files, how far they are, and whether they are what the hub says.

`huggingface_hub` finds, authorises and transfers. What is added here is what its own snapshot does not give: a file that was cut in the
middle goes on from there in the next run, and every file is checked against the hash that the hub publishes for it.
"""

import hashlib
import io
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from weft.errors import UserError, nearest
from weft.weights.model_cache import CHUNK, MANIFEST, FileRecord, Progress

# Seconds within which the hub has to answer the first question. Finding the host is among them, which no socket timeout covers.
ANSWER_TIMEOUT_S = 8.0

# Taken from the top of a repo. Never pickles, and no second copy of the weights in another layout or precision.
WEIGHTS = "model*.safetensors"
BESIDE_WEIGHTS = (
    "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*.tiktoken", "LICENSE*", "README.md",
)  # fmt: skip
_PRECISION_COPY = re.compile(r"model\.(fp16|fp32|bf16|int8)(-.*)?\.safetensors")

T = TypeVar("T")


class HubUnreachable(Exception):
    """The hub did not answer, or not as a hub does."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo. `sha256` is published for large files; for small ones there is git's own SHA-1 of the blob."""

    path: str
    bytes: int
    sha256: str | None
    git_sha1: str | None


def list_repo(repo: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit a revision stands for, and the files at the top of the repo.

    Raises UserError where there is no such repo or revision, or it may not be read, and HubUnreachable where the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def ask() -> Any:
        return HfApi(endpoint=_endpoint()).model_info(repo, revision=revision, files_metadata=True, timeout=ANSWER_TIMEOUT_S)

    try:
        info = _within(ANSWER_TIMEOUT_S, ask)
    except GatedRepoError:
        raise UserError(
            f"the repo '{repo}' asks its users to agree to a licence: do so on its page, then set HF_TOKEN and pull again."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub has no repo '{repo}', or it is private. Check the name, or set HF_TOKEN to a token that may read it."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"the repo '{repo}' has no revision '{revision}'; give a branch, a tag or a commit, or leave --revision out."
        ) from None
    except Exception as error:
        raise HubUnreachable(_reason(error)) from None
    files = []
    for sibling in info.siblings or []:
        if "/" not in sibling.rfilename and "\\" not in sibling.rfilename and sibling.size is not None:
            sha256 = sibling.lfs["sha256"] if sibling.lfs else None
            files.append(RemoteFile(sibling.rfilename, sibling.size, sha256, None if sibling.lfs else sibling.blob_id))
    return str(info.sha), files


def _endpoint() -> str | None:
    """Another hub than the usual one, by the environment variable that its own library reads."""
    return os.environ.get("HF_ENDPOINT") or None


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """The answer of `ask`, or TimeoutError; the thread that waits for a name server is left behind."""
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds")
    return answers[0]


def _reason(error: Exception) -> str:
    """The first line of an error, without addresses."""
    lines = str(error).splitlines() or [""]
    return re.sub(r"\s*(for|from|to)?\s*(url)?:?\s*'?https?://\S+", "", lines[0]).strip(" .:") or type(error).__name__


def choose(repo: str, names: Sequence[str], kind: str | None) -> list[str]:
    """The files to take: safetensors with all that belongs to them, or, where `kind` is given or there are no safetensors, one GGUF file.

    kind  part of a GGUF file's name, in any case: "Q8_0", "q4_k_m".

    Raises UserError where there is nothing to take, or more than one GGUF file and no `kind` that decides.
    """
    names = [name for name in names if name != MANIFEST]
    weights = [name for name in names if fnmatchcase(name, WEIGHTS) and not _PRECISION_COPY.fullmatch(name)]
    if weights and kind is None:
        return sorted(weights + [name for name in names if any(fnmatchcase(name, pattern) for pattern in BESIDE_WEIGHTS)])
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    types = [name.removesuffix(".gguf").replace(".", "-").split("-")[-1] for name in ggufs]
    if kind is not None:
        found = [name for name, own in zip(ggufs, types, strict=True) if own.lower() == kind.lower()]
        found = found or [name for name in ggufs if kind.lower() in name.lower()]
        if len(found) == 1:
            return found
        raise UserError(
            f"the repo '{repo}' has {len(found)} GGUF files for '{kind}'.{nearest(kind, types)} It has: {', '.join(types) or 'none'}."
        )
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise UserError(f"the repo '{repo}' has {len(ggufs)} GGUF files; name one, as in {repo}:{types[0]}. It has: {', '.join(types)}.")
    pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    why = "only pickled weights, which Weft does not fetch" if pickled else "no safetensors and no GGUF file"
    raise UserError(f"the repo '{repo}' has {why}; pull another copy of the model.")


def fetch(repo: str, commit: str, files: Sequence[RemoteFile], folder: Path, progress: Progress | None) -> list[FileRecord]:
    """Bring files into `folder`, taking up what an earlier run left there. Every file is checked before it gets its name.

    Raises UserError where the disk is too small, the connection breaks (what came so far is kept), or a file is not what the hub says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.bytes for file in files)
    here = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free
    if total - here > free:
        raise UserError(
            f"'{repo}' needs {(total - here) / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB left; make room or set WEFT_HOME."
        )
    records, before = [], 0
    with _quiet_bars():
        for file in files:

            def report(done: int, before: int = before, name: str = file.path) -> None:
                if progress:
                    progress(f"fetching {name}", before + done, total)

            records.append(_fetch_file(repo, commit, file, folder, report))
            before += file.bytes
    return records


def _fetch_file(repo: str, commit: str, file: RemoteFile, folder: Path, report: Callable[[int], None]) -> FileRecord:
    path = folder / file.path
    if path.is_file():
        sha256 = _checked(path, file)
        if sha256:
            report(file.bytes)
            return FileRecord(file.path, file.bytes, sha256)
        path.unlink()
    # The hash is part of the name, so that a part of another version is never continued.
    part = folder / f"{file.path}.{(file.sha256 or file.git_sha1 or commit)[:16]}.part"
    for _ in range(2):
        _transfer(repo, commit, file, part, report)
        sha256 = _checked(part, file)
        if sha256:
            os.replace(part, path)
            return FileRecord(file.path, file.bytes, sha256)
        part.unlink()
    raise UserError(
        f"'{file.path}' of '{repo}' came twice with other content than the hub publishes; try again later or from another network."
    )


def _checked(path: Path, file: RemoteFile) -> str | None:
    """SHA-256 of a file that is what the hub says; None for one that is not."""
    if path.stat().st_size != file.bytes:
        return None
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False)
    with open(path, "rb") as content:
        while chunk := content.read(CHUNK):
            sha256.update(chunk)
            if file.sha256 is None:
                sha1.update(chunk)
    right = sha256.hexdigest() == file.sha256 if file.sha256 else file.git_sha1 in (None, sha1.hexdigest())
    return sha256.hexdigest() if right else None


def _transfer(repo: str, commit: str, file: RemoteFile, part: Path, report: Callable[[int], None]) -> None:
    """Append to `part` what it lacks."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if part.exists() and part.stat().st_size > file.bytes:
        part.unlink()
    with _ReportingFile(part, report) as content:
        have = content.tell()
        if have == file.bytes:
            return
        try:
            url = hf_hub_url(repo, file.path, revision=commit, endpoint=_endpoint())
            http_get(url, content, resume_size=have, headers=build_hf_headers(), expected_size=file.bytes)
        except Exception as error:
            raise UserError(
                f"'{file.path}' of '{repo}' stopped at {content.tell() / 1e6:.1f} of {file.bytes / 1e6:.1f} MB ({_reason(error)}). "
                "What came is kept: run the same command again to go on from there."
            ) from None


class _ReportingFile(io.FileIO):
    """A file opened for appending that tells its length after every write."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path, "ab")
        self.report = report

    def write(self, data: Any) -> int:
        left = memoryview(data)
        while left:
            left = left[super().write(left) :]
        self.report(self.tell())
        return len(data)


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Without the transfer library's own progress bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()
