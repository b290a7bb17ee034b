"""Documents through a tokenizer into a folder of shards: one pass to check and count them, one to write."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from weft.data.documents import Document
from weft.data.encoder import Marks, TextTokenizer, byte_table, choose_marks, fingerprint, join_pair
from weft.data.holdout import Census, Holdout, Method, check, size
from weft.data.shards import (
    INDEX,
    SHARD_TOKENS,
    TOKEN_BYTES,
    TOKENIZER,
    Manifest,
    ShardWriter,
    SourceFile,
    Split,
    Tokenizer,
    is_prepared,
    open_shards,
    read_manifest,
)
from weft.data.sources import Corpus, Reading, find_files, read_documents
from weft.errors import UserError
from weft.files import atomic_folder, atomic_write, sha256

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all
BATCH_BYTES = 1 << 21  # text tokenised at once: some 500,000 tokens
BATCH_DOCUMENTS = 4096
DEFAULT_SHARE = 0.01


@dataclass(frozen=True)
class Settings:
    """How a corpus becomes shards.

    reading  how files become documents.
    valid    share of the documents to hold out; None is 0.01, or 0 where the corpus brings a validation split of its own.
    method   how they are chosen, see `Holdout`.
    bos      put a BOS before each document: True, False, or None for what suits the tokenizer (see `choose_marks`).
    eos      put the tokenizer's end token after each document.
    """

    reading: Reading = field(default_factory=Reading)
    valid: float | None = None
    method: Method = "auto"
    bos: bool | None = None
    eos: bool = True
    shard_tokens: int = SHARD_TOKENS


@dataclass(frozen=True)
class Prepared:
    """The result: `reused` says that the folder already held exactly this data; `empty` counts documents left out for want of text."""

    folder: Path
    manifest: Manifest
    reused: bool
    empty: int = 0
    ignored: tuple[Path, ...] = ()


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: TextTokenizer,
    folder: str | Path,
    settings: Settings | None = None,
    *,
    tokenizer_source: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenise files and folders into `folder`; memory stays bounded whatever their size.

    tokenizer_source   what the user calls the tokenizer, kept in the manifest.
    force              replace data that was prepared from something else; other folders are never replaced.
    The folder appears whole or not at all. Data already prepared from the same files in the same way is left as it is. Raises
    UserError for input that cannot be read, an empty corpus, and a folder that holds anything but prepared data.
    """
    settings, folder, report = settings or Settings(), Path(folder), progress or (lambda stage, done, total: None)
    check(settings.valid or 0.0, settings.method)
    corpus = find_files(inputs, settings.reading.patterns)
    if corpus.valid and settings.valid:
        raise UserError(f"{corpus.valid[0]} is already the validation split; leave --valid out, or take that file away.")
    described = _describe(corpus, tokenizer, tokenizer_source, settings)
    if is_same(folder, described, force):
        return Prepared(folder, read_manifest(folder), reused=True, ignored=corpus.ignored)
    share = 0.0 if corpus.valid else DEFAULT_SHARE if settings.valid is None else settings.valid
    train, valid = (_census(files, settings.reading, share, report) for files in (corpus.train, corpus.valid))
    if not train.documents or (corpus.valid and not valid.documents):
        files = corpus.valid if train.documents else corpus.train
        raise UserError(f"the corpus is empty: there is no text in {', '.join(map(str, files[:3]))}; give files with text.")
    holdout = Holdout(train, share, settings.method)
    total = train.text_bytes + valid.text_bytes
    with atomic_folder(folder) as temporary:
        writer = _Writer(temporary, described, tokenizer, settings.shard_tokens)
        done = 0
        for batch in _batches(_divided(corpus, settings.reading, holdout)):
            writer.write(batch)
            done += sum(size(document) for _, document in batch)
            report("tokenise", done, total)
        manifest = writer.finish(total, wants_valid=bool(share or corpus.valid))
        if hasattr(tokenizer, "save"):
            tokenizer.save(temporary / TOKENIZER)
        atomic_write(temporary / INDEX, manifest.model_dump_json(indent=1))
    return Prepared(folder, manifest, reused=False, empty=train.empty + valid.empty, ignored=corpus.ignored)


def _describe(corpus: Corpus, tokenizer: TextTokenizer, source: str, settings: Settings) -> Manifest:
    """The manifest as far as it is known before anything is read."""
    marks, reading = choose_marks(tokenizer, settings.bos, settings.eos), settings.reading
    sides: list[tuple[Path, Split]] = [(path, "train") for path in corpus.train] + [(path, "valid") for path in corpus.valid]
    return Manifest(
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        tokenizer=Tokenizer(sha256=fingerprint(tokenizer), source=source, vocab_size=tokenizer.vocab_size, bos=marks.bos, eos=marks.eos),
        exact_bytes=False,
        prefix_bytes=0,
        settings={
            "field": reading.field,
            "separator": reading.separator,
            "valid": settings.valid,
            "holdout": settings.method,
        },
        sources=tuple(describe_file(path, side) for path, side in sides),
        splits={},
    )


def describe_file(path: Path, side: Split) -> SourceFile:
    try:
        return SourceFile(path=str(path), bytes=path.stat().st_size, sha256=sha256(path), split=side)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None


def is_same(folder: Path, described: Manifest, force: bool) -> bool:
    """Whether `folder` already holds this data, whole; raises UserError where it holds something that must not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not folder.is_dir() or not is_prepared(folder):
        raise UserError(f"{folder} exists and is not prepared data, so it is left alone; choose another folder for the output.")
    try:
        old = read_manifest(folder)
    except UserError as error:
        if force:
            return False
        raise UserError(f"{error} Add --force to replace it.") from None
    if _essence(old) != _essence(described):
        if force:
            return False
        raise UserError(f"{folder} was prepared from other files or in another way; add --force to replace it, or choose another folder.")
    try:
        for split in old.splits:
            open_shards(folder, split)
    except UserError:  # cut short: made again
        return False
    return True


def _essence(manifest: Manifest) -> tuple[object, ...]:
    """What decides whether two preparations give the same ids; the files' names do not."""
    facts = manifest.tokenizer
    files = [(source.bytes, source.sha256, source.split) for source in manifest.sources]
    return facts.sha256, facts.bos, facts.eos, dict(manifest.settings), files


def _census(files: Sequence[Path], reading: Reading, share: float, report: Progress) -> Census:
    """Read every document once: bad input is found before anything is written."""
    census, before = Census(), 0
    sizes = [path.stat().st_size for path in files]
    for path, whole in zip(files, sizes, strict=True):
        start = census.text_bytes
        for document in read_documents(path, reading):
            census.count(document, share)
            report("read", before + min(whole, census.text_bytes - start), sum(sizes))
        before += whole
    return census


def _divided(corpus: Corpus, reading: Reading, holdout: Holdout) -> Iterator[tuple[Split, Document]]:
    """Every document that has text, with its split."""
    for path in corpus.train:
        for document in read_documents(path, reading):
            if document.text:
                yield from holdout.divide(document)
    for path in corpus.valid:
        for document in read_documents(path, reading):
            if document.text:
                yield "valid", document


def _batches(divided: Iterator[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    batch: list[tuple[Split, Document]] = []
    held = 0
    for split, document in divided:
        batch.append((split, document))
        held += len(document.text) + len(document.prompt or "")
        if held >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


@dataclass
class _Open:
    """The document of a split that is being written."""

    text_bytes: int = 0
    text_tokens: int = 0
    begun: bool = False


class _Writer:
    """Ids of documents into the shards of both splits."""

    def __init__(self, folder: Path, described: Manifest, tokenizer: TextTokenizer, shard_tokens: int) -> None:
        self.folder, self.described, self.tokenizer = folder, described, tokenizer
        self.marks = Marks(described.tokenizer.bos, described.tokenizer.eos)
        self.table = byte_table(tokenizer)
        self.excess: set[int] = set()  # by how many bytes the table overstates a text
        vocab = described.tokenizer.vocab_size
        self.writers: dict[Split, ShardWriter] = {
            "train": ShardWriter(folder, "train", described.dtype, vocab, shard_tokens),
            "valid": ShardWriter(folder, "valid", described.dtype, vocab, shard_tokens),
        }
        self.open: dict[Split, _Open] = {"train": _Open(), "valid": _Open()}
        self.seen = 0

    def write(self, batch: Sequence[tuple[Split, Document]]) -> None:
        """Tokenise a batch of documents in one call and append each to its split."""
        texts: list[str] = []
        for _, document in batch:
            texts += [document.text] if document.prompt is None else [document.prompt, document.prompt + document.text, document.text]
        encoded = iter(self.tokenizer.encode_batch(texts))
        for split, document in batch:
            prompt = None if document.prompt is None else next(encoded)
            ids = next(encoded) if prompt is None else join_pair(prompt, next(encoded), next(encoded))
            self._append(split, document, prompt, ids)

    def _append(self, split: Split, document: Document, prompt: list[int] | None, ids: list[int]) -> None:
        writer, state = self.writers[split], self.open[split]
        if not document.continues:
            self._end(split)
            state = self.open[split] = _Open(begun=True)
            if self.marks.bos is not None:
                writer.add([self.marks.bos], trained=prompt is None)
        if prompt is not None:
            writer.add(prompt, trained=False)
        writer.add(ids, trained=True)
        length = size(document)
        state.text_bytes += length
        state.text_tokens += len(ids)
        self.seen += length
        if self.table is not None and (prompt or ids):
            spelled = int(self.table[np.array((prompt or []) + ids, dtype=np.int64)].sum())
            self.excess.add(spelled - length - len((document.prompt or "").encode("utf-8")))

    def _end(self, split: Split) -> None:
        if self.open[split].begun:
            if self.marks.eos is not None:
                self.writers[split].add([self.marks.eos], trained=True)
            self.writers[split].end_document(self.open[split].text_bytes, self.open[split].text_tokens)
            self.open[split] = _Open()

    def finish(self, total: int, wants_valid: bool) -> Manifest:
        """Close both splits and complete the manifest; `total` is the text that the first pass counted, in bytes."""
        for split in self.writers:
            self._end(split)
        if self.seen != total:
            raise UserError(f"the files changed while they were read ({total:,} bytes of text became {self.seen:,}); run it again.")
        splits = {split: shards for split, writer in self.writers.items() if (shards := writer.finish())}
        if "train" not in splits or (wants_valid and "valid" not in splits):
            side = "held out" if "train" in splits else "left to train on"
            raise UserError(f"the corpus is too small: no text could be {side}; give more text, or --valid 0 to hold out none.")
        exact = self.table is not None and self.excess in ({0}, {1})
        if exact and self.table is not None:
            atomic_write(self.folder / TOKEN_BYTES, self.table.astype("<i4").tobytes())
        facts = {name: getattr(self.described, name) for name in ("dtype", "tokenizer", "settings", "sources")}
        return Manifest(**facts, splits=splits, exact_bytes=exact, prefix_bytes=min(self.excess) if exact else 0)
