"""Tuning records through a chat template into a folder of shards with masks: what packed fine-tuning reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import numpy as np

from weft.data.encode_records import Encoded, RecordEncoder
from weft.data.encoder import byte_table, choose_marks, fingerprint
from weft.data.examples import draw_held_out
from weft.data.prepare import Prepared, Progress, describe_file, is_same
from weft.data.read_records import TEXTS, iterate_records, list_files
from weft.data.record_kinds import Record
from weft.data.rows import is_hub_name
from weft.data.shards import INDEX, TOKEN_BYTES, TOKENIZER, Manifest, ShardWriter, SourceFile, Split, read_manifest
from weft.data.shards import Tokenizer as TokenizerFacts
from weft.errors import UserError
from weft.files import atomic_folder, atomic_write
from weft.tokenizer import Tokenizer

DROPPED = "dropped.txt"  # why records were left out, a line each


@dataclass(frozen=True)
class RecordSettings:
    """How records become shards.

    length    the most tokens of a text (see `RecordEncoder`).
    valid     share of the records to hold out, drawn by `seed`; None is a tenth, at most 512.
    held_out  a file of records to hold out instead.
    drop_bad  leave out records that are wrong.
    """

    length: int
    valid: float | None = None
    held_out: str | None = None
    seed: int = 0
    drop_bad: bool = False


def prepare_records(
    source: str, tokenizer: Tokenizer, folder: str | Path, settings: RecordSettings, progress: Progress | None = None
) -> Prepared:
    """Write the shards of a file, a folder of files or a dataset of a hub; `folder` appears whole or not at all, and is left as it is
    where it already holds just this. Raises UserError for the first record that is wrong.
    """
    folder, report = Path(folder), progress or (lambda stage, done, total: None)
    described = _describe(source, tokenizer, settings)
    if is_same(folder, described, force=True):
        return Prepared(folder, read_manifest(folder), reused=True)
    dropped: list[UserError] = []
    count = sum(1 for _ in _records(source, settings, dropped))
    if not count:
        raise UserError(f"there is no record in {source} to train on{f' but wrong ones: {dropped[0]}' if dropped else ''}.")
    dropped.clear()
    held = draw_held_out(count, 0.0 if settings.held_out is not None else settings.valid, settings.seed)
    encoder = RecordEncoder(tokenizer, settings.length)
    with atomic_folder(folder) as temporary:
        writer = _Writer(temporary, described, tokenizer)
        for index, record in enumerate(_records(source, settings, dropped)):
            writer.write("valid" if index in held else "train", _encoded(encoder, record, settings, dropped))
            report("tokenise", index + 1, count)
        if settings.held_out is not None:
            for record in _records(settings.held_out, settings, dropped):
                writer.write("valid", _encoded(encoder, record, settings, dropped))
        manifest = writer.finish()
        if "train" not in manifest.splits:
            raise UserError(f"no record of {source} can be trained on; the first error is: {dropped[0]}")
        atomic_write(temporary / TOKEN_BYTES, writer.table.astype("<i4").tobytes())
        atomic_write(temporary / DROPPED, "".join(f"{error}\n" for error in dropped))
        tokenizer.save(temporary / TOKENIZER)
        atomic_write(temporary / INDEX, manifest.model_dump_json(indent=1))
    return Prepared(folder, manifest, reused=False)


def why_dropped(folder: str | Path) -> list[str]:
    """Why records were left out of a prepared folder, a sentence each."""
    path = Path(folder) / DROPPED
    return path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []


def _records(source: str, settings: RecordSettings, dropped: list[UserError]) -> Iterator[Record]:
    return iterate_records(source, TEXTS, dropped if settings.drop_bad else None)


def _encoded(encoder: RecordEncoder, record: Record, settings: RecordSettings, dropped: list[UserError]) -> list[Encoded]:
    try:
        return encoder.encode(record)
    except UserError as error:
        if not settings.drop_bad:
            raise
        dropped.append(error)
        return []


def _describe(source: str, tokenizer: Tokenizer, settings: RecordSettings) -> Manifest:
    """The manifest as far as it is known before anything is read. The template decides about ids, so it is part of it."""
    marks = choose_marks(tokenizer)
    sides: list[tuple[str | Path, Split]] = [(path, "train") for path in list_files(source)]
    sides += [(path, "valid") for path in ([] if settings.held_out is None else list_files(settings.held_out))]
    templates = "\0".join(f"{name}\0{text}" for name, text in sorted(tokenizer.settings.chat_templates.items()))
    return Manifest(
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        tokenizer=TokenizerFacts(
            sha256=fingerprint(tokenizer), source="the model's", vocab_size=tokenizer.vocab_size, bos=marks.bos, eos=marks.eos
        ),
        exact_bytes=True,
        prefix_bytes=0,
        settings={
            "records": True,
            "long_texts": "pieces",
            "template": sha256(templates.encode()).hexdigest(),
            "length": settings.length,
            "valid": settings.valid,
            "seed": settings.seed,
            "drop_bad": settings.drop_bad,
        },
        sources=tuple(_source(path, side) for path, side in sides),
        splits={},
    )


def _source(path: str | Path, side: Split) -> SourceFile:
    if is_hub_name(path):
        return SourceFile(path=str(path), bytes=0, sha256=sha256(str(path).encode()).hexdigest(), split=side)
    return describe_file(Path(path), side)


class _Writer:
    """Encoded texts into the shards of both splits, a document each."""

    def __init__(self, folder: Path, described: Manifest, tokenizer: Tokenizer) -> None:
        self.described = described
        table = byte_table(tokenizer)
        assert table is not None
        self.table: np.ndarray = table
        splits: tuple[Split, Split] = ("train", "valid")
        self.writers = {split: ShardWriter(folder, split, described.dtype, tokenizer.vocab_size) for split in splits}

    def write(self, split: Split, texts: list[Encoded]) -> None:
        writer = self.writers[split]
        for text in texts:
            for trained, run in groupby(zip(text.ids, text.trained, strict=True), key=lambda pair: pair[1]):
                writer.add([token for token, _ in run], trained)
            learned = [token for token, trained in zip(text.ids, text.trained, strict=True) if trained]
            writer.end_document(int(self.table[learned].sum()), len(learned))

    def finish(self) -> Manifest:
        splits = {split: shards for split, writer in self.writers.items() if (shards := writer.finish())}
        facts = {name: getattr(self.described, name) for name in ("dtype", "tokenizer", "settings", "sources")}
        return Manifest(**facts, splits=splits, exact_bytes=True, prefix_bytes=0)
