"""Which files make a corpus, which of them are held out, and their documents one after another."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.data.documents import Document
from weft.data.records import read_jsonl_documents, read_parquet_documents
from weft.data.rows import JSONL, PARQUET, ending
from weft.data.text_files import PIECE_BYTES, read_text_documents
from weft.errors import UserError

SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".parquet")  # what a folder is searched for without patterns
# `train.jsonl`, `valid.txt`, `validation.parquet`, `train-00000-of-00002.parquet`
SPLIT_NAME = re.compile(r"(train|valid|validation|val)([-_]\d[^.]*)?(\.(txt|jsonl|ndjson|parquet|pq)(\.gz)?)?")


@dataclass(frozen=True)
class Reading:
    """How files become documents.

    field        the text field of JSONL and Parquet; None takes `text`, or `prompt` and `completion`.
    separator    a line that divides a text file into documents; None makes each file one document.
    patterns     file names to take from folders, such as ("*.py",); empty takes those that end in `SUFFIXES`.
    piece_bytes  a longer text is handed on in pieces of about this size.
    """

    field: str | None = None
    separator: str | None = None
    patterns: tuple[str, ...] = ()
    piece_bytes: int = PIECE_BYTES


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus in reading order, those set apart for validation, and those of a split folder that are neither."""

    train: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    ignored: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return self.train + self.valid


def find_files(inputs: Sequence[str | Path], patterns: Sequence[str] = ()) -> Corpus:
    """Turn files and folders into a corpus.

    A folder that holds `train.jsonl`, `.txt` or `.parquet` (or folders `train` and `valid`) is read as splits: `train` and `valid`, also
    written `validation` and `val`; anything else in it is ignored. Files given one by one are told apart in the same way. Other
    folders are searched through in sorted order, hidden files left out. Raises UserError for a path that does not exist and a
    corpus without files.
    """
    if not inputs:
        raise UserError("no input was given; name a text, JSONL or Parquet file, or a folder of them.")
    given = [Path(entry) for entry in inputs]
    for path in given:
        if not path.exists():
            raise UserError(f"there is no file or folder {path}; give a text, JSONL or Parquet file, or a folder of them.")
        if path.is_file() and ending(path) == ".json":
            raise UserError(f'{path} is one JSON value; records are read one a line: convert it with `jq -c ".[]" {path} > {path}l`.')
    roles: dict[str, list[Path]] = {"train": [], "valid": [], "ignored": []}
    _add_splits([path for path in given if not path.is_dir()], roles, otherwise="train")
    for folder in (path for path in given if path.is_dir()):
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        found = [path for path in entries if not path.is_dir()]
        if {"train", "valid"} <= {_split(path) for path in entries if path.is_dir()}:
            found = entries
        if any(_split(path) == "train" for path in found):
            _add_splits(found, roles, otherwise="ignored", patterns=patterns)
        else:
            roles["train"] += _search(folder, patterns)
    corpus = Corpus(_unique(roles["train"]), _unique(roles["valid"]), _unique(roles["ignored"]))
    if not corpus.train:
        raise UserError(f"no files to train on were found in {', '.join(map(str, given))}; {_what_is_there(given, patterns)}")
    both = set(map(os.path.realpath, corpus.train)) & set(map(os.path.realpath, corpus.valid))
    if both:
        raise UserError(f"{min(both)} is both in the training and in the validation split; list it once.")
    return corpus


def _add_splits(paths: Sequence[Path], roles: dict[str, list[Path]], otherwise: str, patterns: Sequence[str] = ()) -> None:
    """Sort files and folders into the training and the validation split by name; without a `train` among them there are no splits."""
    named = any(_split(path) == "train" for path in paths)
    for path in paths:
        role = (_split(path) if named else None) or otherwise
        if not path.is_dir():
            roles[role].append(path)
        elif role != "ignored":
            roles[role] += _search(path, patterns)


def _split(path: Path) -> str | None:
    """`train` or `valid` where the name says so."""
    match = SPLIT_NAME.fullmatch(path.name)
    return None if match is None else "train" if match[1] == "train" else "valid"


def read_documents(path: Path, reading: Reading) -> Iterator[Document]:
    """Yield the documents of one file, by the ending of its name: JSONL, Parquet, or else text. `.gz` is read through."""
    kind = ending(path)
    if kind in JSONL:
        return read_jsonl_documents(path, reading.field)
    if kind in PARQUET:
        return read_parquet_documents(path, reading.field)
    return read_text_documents(path, reading.separator, reading.piece_bytes)


def check_used(corpus: Corpus, reading: Reading) -> None:
    """Raise UserError for a setting that no file of the corpus would make use of."""
    records = [ending(path) in JSONL + PARQUET for path in corpus.files]
    if reading.field is not None and not any(records):
        raise UserError(f"a field '{reading.field}' was named, but no file is JSONL or Parquet; leave the field out for plain text.")
    if reading.separator is not None and all(records):
        raise UserError("a separator line was given, but no file is plain text; in JSONL and Parquet each record is a document.")


def _unique(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Without the second and later mentions of a file."""
    first: dict[str, Path] = {}
    for path in paths:
        first.setdefault(os.path.realpath(path), path)
    return tuple(first.values())


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    if patterns:
        return any(path.match(pattern) for pattern in patterns)
    return ending(path) in SUFFIXES


def _search(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Every file below a folder that matches, in sorted order; hidden files and folders are left out, links to folders not followed."""
    found: list[Path] = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(base, name) for name in names if not name.startswith(".") and _matches(Path(base, name), patterns)]
    return sorted(path for path in found if path.is_file())


def _what_is_there(inputs: Sequence[Path], patterns: Sequence[str]) -> str:
    """Advice for a search that found nothing: what was looked for, and which endings lie there instead."""
    looked = f"looked for {', '.join(patterns)}" if patterns else f"looked for {', '.join('*' + suffix for suffix in SUFFIXES)}"
    endings: dict[str, int] = {}
    for folder in inputs:
        for _, _, names in os.walk(folder):
            for name in names:
                ending = Path(name).suffix
                endings[ending] = endings.get(ending, 0) + bool(ending)
    common = max(endings, key=lambda ending: endings[ending], default="")
    if not common:
        return f"{looked}. Add files."
    return f"{looked}. There are {endings[common]} *{common} files: take them with --pattern '*{common}'."
