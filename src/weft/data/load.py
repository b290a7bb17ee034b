"""From what a recipe says about data to batches."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat

from weft.data.batches import Batches
from weft.data.encoder import TextTokenizer, fingerprint
from weft.data.mixture import Mixture
from weft.data.prepare import Progress, Settings, prepare
from weft.data.shards import is_prepared, open_shards, read_manifest
from weft.data.sources import Reading
from weft.data.windows import Mode, Windows, cut
from weft.errors import UserError
from weft.spec.base import Spec, parse


class SourceSpec(Spec):
    """One source: a prepared folder, or text, JSONL or Parquet files that are prepared on first use.

    weight   of its rows among all rows drawn; None, for all sources or none, weighs by tokens.
    name     in the data table; None is the last part of the path.
    """

    path: str
    weight: PositiveFloat | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        return self.name or Path(self.path).name or self.path


class DataSpec(Spec):
    """The `data` of a recipe.

    `field`, `separator`, `pattern` and `valid` are for sources that are not prepared yet, see `sources.Reading` and
    `prepare.Settings`. For tuning records (see `weft.data.read_records`):

    held_out  a file of records to evaluate on, instead of a share of the others.
    drop_bad  leave records out that are wrong, instead of refusing the file.
    chat_template  instead of the model's: chatml, plain (which any tokenizer can spell), or a file of Jinja. It is saved with the model.
    """

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    packing: Mode = "pack"
    shuffle: bool = True
    field: str | None = None
    separator: str | None = None
    pattern: tuple[str, ...] = ()
    valid: float | None = Field(default=None, ge=0, lt=1)
    held_out: str | None = None
    drop_bad: bool = False
    chat_template: str | None = None


def parse_data(value: Any) -> DataSpec:
    """A `DataSpec` from a path, a list of paths or sources, or a mapping; raises UserError for anything else."""
    if isinstance(value, DataSpec):
        return value
    if isinstance(value, str | Path):
        value = [value]
    if isinstance(value, Sequence):
        value = {"sources": value}
    if isinstance(value, dict) and isinstance(value.get("sources"), list | tuple):
        value = value | {"sources": [{"path": str(entry)} if isinstance(entry, str | Path) else entry for entry in value["sources"]]}
    spec: DataSpec = parse(DataSpec, value, "data")
    return spec


def open_batches(
    data: DataSpec,
    length: int,
    batch_size: int,
    *,
    seed: int = 0,
    tokenizer: TextTokenizer | None = None,
    cache: Path | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
    make: Callable[[SourceSpec], Path] | None = None,
) -> Batches:
    """Open every source of `data` and return its batches of `batch_size` rows of `length` tokens.

    tokenizer   the model's; sources made with another one are refused. Needed where a source is not prepared.
    cache       folder under which such sources are prepared; with several ranks, call this on one of them first.
    make        prepares such a source instead, and returns its folder.
    Sources with a held-out split make up the validation data. Raises UserError as `prepare`, `open_shards` and `Mixture` do.
    """

    def prepared(source: SourceSpec) -> Path:
        if make is not None and not is_prepared(source.path):
            return make(source)
        return _prepared(Path(source.path), data, tokenizer, cache, progress)

    folders = [(source, prepared(source)) for source in data.sources]
    wanted = None if tokenizer is None else fingerprint(tokenizer)
    train: list[tuple[str, Windows, float | None]] = []
    valid: list[tuple[str, Windows, float | None]] = []
    for source, folder in folders:
        train.append((source.label, cut(open_shards(folder, "train", wanted), length, data.packing), source.weight))
        if "valid" in read_manifest(folder).splits:
            valid.append((source.label, cut(open_shards(folder, "valid", wanted), length, data.packing), None))
    held_out = Mixture(valid) if valid else None
    return Batches(Mixture(train), batch_size, valid=held_out, seed=seed, shuffle=data.shuffle, rank=rank, world=world)


def _prepared(path: Path, data: DataSpec, tokenizer: TextTokenizer | None, cache: Path | None, progress: Progress | None) -> Path:
    """The prepared folder of a source, made now where the path is raw text."""
    if is_prepared(path):
        return path
    if not path.exists():
        raise UserError(f"there is no data at {path}; give a folder made by `weft data prepare`, or text, JSONL or Parquet files.")
    if tokenizer is None or cache is None:
        raise UserError(f"{path} is not prepared yet; make it into shards with `weft data prepare {path} --tokenizer T -o DIR` first.")
    reading = Reading(data.field, data.separator, data.pattern)
    key = f"{path.resolve()}\0{fingerprint(tokenizer)}\0{reading}\0{data.valid}"
    folder = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    prepare([path], tokenizer, folder, Settings(reading, data.valid), tokenizer_source="the model's", force=True, progress=progress)
    return folder
