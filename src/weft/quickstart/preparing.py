"""The first steps: the corpus read and split, a vocabulary trained on it, and both parts as tokens."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.data.prepare import Settings as ShardSettings
from weft.data.prepare import prepare
from weft.data.shards import open_shards
from weft.files import atomic_folder, atomic_write
from weft.quickstart.corpus import Corpus, SourceFile, read_folder, read_stdlib
from weft.quickstart.ledger import content_key
from weft.quickstart.pairs import Pair, make_pairs
from weft.quickstart.reporter import Reporter
from weft.quickstart.settings import Settings
from weft.quickstart.split import Split, split_corpus, units_of
from weft.quickstart.workplace import Workplace
from weft.rewards.python import read_function
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.tokenizer.train import train_tokenizer


@dataclass(frozen=True)
class Material:
    """The corpus in memory, split; `key` changes with any byte of it."""

    corpus: Corpus
    split: Split
    num_units: int
    key: str

    @property
    def training_text(self) -> bytes:
        return "".join(file.text for file in self.split.train).encode()

    @property
    def heldout_text(self) -> bytes:
        return "".join(file.text for file in self.split.heldout).encode()


def read_material(folder: Path | None, settings: Settings) -> Material:
    """Read and split the corpus; cheap enough to do again at every start."""
    corpus = read_stdlib() if folder is None else read_folder(folder)
    split = split_corpus(corpus, settings.heldout)
    digest = hashlib.sha256()
    for side in (split.train, split.heldout):
        for file in side:
            digest.update(f"{file.path}\0{file.num_bytes}\0{file.text}".encode())
        digest.update(b"\1")
    return Material(corpus, split, len(units_of(corpus)), content_key(digest.hexdigest()))


def describe_material(material: Material) -> dict[str, Any]:
    """What was read, JSON-ready."""
    corpus, split = material.corpus, material.split
    return {
        "name": corpus.name,
        "kind": corpus.kind,
        "files": len(corpus.files),
        "bytes": corpus.num_bytes,
        "skipped": corpus.skipped,
        "split": split.method,
        "units": material.num_units,
        "heldout_units": [name for group in split.heldout_units for name in group],
        "heldout_files": len(split.heldout),
        "heldout_bytes": split.heldout_bytes,
        "train_bytes": split.train_bytes,
    }


def write_corpus(material: Material, folder: Path) -> None:
    """Both sides as JSONL, a document a file, where data preparation finds them by name."""
    _write_records(folder, {"train": _documents(material.split.train), "valid": _documents(material.split.heldout)})


def _documents(files: Iterable[SourceFile]) -> list[dict[str, str]]:
    return [{"path": file.path, "text": file.text} for file in files]


def _write_records(folder: Path, sides: dict[str, list[dict[str, str]]]) -> None:
    with atomic_folder(folder) as partial:
        for side, records in sides.items():
            with open(partial / f"{side}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def make_tokens(material: Material, settings: Settings, place: Workplace, key: str, reporter: Reporter) -> dict[str, Any]:
    """Train a byte-level BPE on the training side and turn both sides into shards."""
    reporter.advance(0, None, "reading")
    write_corpus(material, place.corpus)
    reporter.advance(0, None, "merging pairs of tokens")
    wanted = settings.tokens.vocab_for(material.split.train_bytes)
    tokenizer = train_tokenizer("bpe", (file.text for file in material.split.train), wanted, split=settings.tokens.split)
    tokenizer.save(place.tokenizer)
    shards = encode(place.corpus, tokenizer, place.run_folder("shards", key), reporter)
    train, heldout = open_shards(shards, "train"), open_shards(shards, "valid")
    return {
        "vocab": tokenizer.vocab_size,
        "train_tokens": train.num_tokens,
        "heldout_tokens": heldout.num_tokens,
        "bytes_per_token": material.split.train_bytes / train.num_tokens,
    }


def encode(source: Path, tokenizer: Tokenizer, folder: Path, reporter: Reporter) -> Path:
    """A folder of JSONL as shards, with progress."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "tokenise":
            reporter.advance(done, total, "turning text into tokens")

    prepare([source], tokenizer, folder, ShardSettings(), tokenizer_source="quickstart", force=True, progress=progress)
    return folder


def collect_pairs(material: Material, settings: Settings) -> tuple[list[Pair], list[Pair]]:
    """Pairs of the training side, and of the held-out side."""
    limits = settings.fine_tuning.max_prompt, settings.fine_tuning.max_body
    return make_pairs(material.split.train, *limits), make_pairs(material.split.heldout, *limits)


def write_pairs(train: list[Pair], heldout: list[Pair], folder: Path) -> None:
    sides = {"train": train, "valid": heldout}
    records = {side: [{"prompt": pair.prompt, "completion": pair.body} for pair in pairs] for side, pairs in sides.items() if pairs}
    _write_records(folder, records)


def write_prompts(pairs: list[Pair], settings: Settings, tokenizer: Tokenizer, path: Path) -> int:
    """Prompts with the bodies that people wrote, of functions that have parameters and leave room for an answer; returns how many."""
    chosen = settings.reinforcing
    functions = [(pair, read_function(pair.prompt, pair.body)) for pair in pairs if len(pair.prompt) <= settings.judging.max_prompt]
    fitting = [pair for pair, found in functions if found is not None and found.parameters]
    ids = tokenizer.encode_batch([pair.prompt for pair in fitting])
    room = chosen.length - chosen.max_tokens - 1  # a tokenizer may put a mark before a text
    kept = [pair for pair, each in zip(fitting, ids, strict=True) if len(each) <= room]
    atomic_write(path, "".join(json.dumps({"prompt": pair.prompt, "completion": pair.body}) + "\n" for pair in kept))
    return len(kept)


def tokenizer_of(place: Workplace) -> Tokenizer:
    return load_tokenizer(place.tokenizer)
