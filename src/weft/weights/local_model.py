"""Keeping a copy of a model of this machine in the cache under a name."""

import hashlib
import os
from fnmatch import fnmatchcase
from pathlib import Path

from weft.errors import UserError
from weft.weights.gguf_header import read_header
from weft.weights.hub_download import BESIDE_WEIGHTS
from weft.weights.layout import find_weights
from weft.weights.model_cache import CHUNK, MANIFEST, FileRecord, Progress
from weft.weights.safetensors_header import read_safetensors_header


def copy_in(path: Path, folder: Path, progress: Progress | None) -> tuple[str, list[FileRecord]]:
    """Check the model at `path` and copy what belongs to it into `folder`; returns where it came from and the files.

    path  a .gguf file, or a folder in Hugging Face layout with config.json and safetensors, or with one .gguf file.

    Raises UserError where it is damaged, cut short, or not a model.
    """
    files = [path] if path.is_file() else _files_of(path)
    for file in files:
        if file.suffix == ".gguf":
            read_header(file)
        elif file.suffix == ".safetensors":
            read_safetensors_header(file)
        elif path.is_file():
            raise UserError(f"{path} is not a model; give a .gguf file or a folder with config.json and safetensors.")
    folder.mkdir(parents=True, exist_ok=True)
    total, done, records = sum(file.stat().st_size for file in files), 0, []
    for file in files:
        records.append(_copy(file, folder / file.name, done, total, progress))
        done += records[-1].bytes
    return f"path:{path}", records


def _files_of(folder: Path) -> list[Path]:
    if (folder / "config.json").is_file():
        weights = list(find_weights(folder))
        if any(file.suffix != ".safetensors" for file in weights):
            raise UserError(f"{folder} holds pickled weights, which are not kept in the cache; write it as safetensors first: weft export.")
        beside = [file for file in sorted(folder.iterdir()) if any(fnmatchcase(file.name, pattern) for pattern in BESIDE_WEIGHTS)]
        return [*(file for file in beside if file.is_file() and file.name != MANIFEST), *weights]
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) != 1:
        raise UserError(f"{folder} is not a model: it has no config.json and {len(ggufs)} GGUF files. Give a model folder or a .gguf file.")
    return ggufs


def _copy(source: Path, target: Path, before: int, total: int, progress: Progress | None) -> FileRecord:
    part = target.with_name(target.name + ".part")
    sha, size = hashlib.sha256(), 0
    with open(source, "rb") as content, open(part, "wb") as out:
        while chunk := content.read(CHUNK):
            out.write(chunk)
            sha.update(chunk)
            size += len(chunk)
            if progress:
                progress(f"copying {source.name}", before + size, total)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, target)
    return FileRecord(target.name, size, sha.hexdigest())
