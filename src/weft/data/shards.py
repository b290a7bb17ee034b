"""The folder of prepared data: memory-mapped shards and the manifest that describes them.

    index.json          the manifest, written last
    train-00000.bin     token ids, little-endian uint16 where the vocabulary allows it, else uint32
    train-00000.idx     three int64 arrays of one number a document: end position, text bytes, text tokens (see `store.Part`)
    train-00000.mask    one bit a token, only where some tokens are not trained on
    valid-00000.*       the held-out documents, in the same form
    token_bytes.bin     int32 bytes of text of each id, where that is exact
    tokenizer/          the tokenizer, as `load_tokenizer` reads it

A document never straddles two shards.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from weft.data.encoder import Marks
from weft.data.store import Part, TokenStore, map_array
from weft.errors import UserError, unknown
from weft.files import read_text, sha256
from weft.spec.base import Spec, parse

INDEX = "index.json"
TOKEN_BYTES = "token_bytes.bin"
TOKENIZER = "tokenizer"
Split = Literal["train", "valid"]
Ending = Literal["bin", "idx", "mask"]
SHARD_TOKENS = 1 << 27  # a shard is closed at the first document end beyond this: 256 MiB of uint16


class Shard(Spec):
    """One shard of the manifest: `sha256` maps the ending of each of its files to its digest."""

    name: str = Field(pattern=r"^(train|valid)-\d{5}$")
    tokens: PositiveInt
    documents: PositiveInt
    text_bytes: NonNegativeInt
    trained_tokens: NonNegativeInt
    masked: bool
    sha256: dict[Ending, str]


class SourceFile(Spec):
    """A file the data was made from."""

    path: str
    bytes: NonNegativeInt
    sha256: str
    split: Split


class Tokenizer(Spec):
    """The tokenizer that made the ids: `sha256` is its fingerprint, `source` what the user called it."""

    sha256: str
    source: str
    vocab_size: PositiveInt
    bos: int | None
    eos: int | None


class Manifest(Spec):
    """What index.json says."""

    format: Literal["weft-shards"] = "weft-shards"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: Tokenizer
    exact_bytes: bool
    prefix_bytes: int
    settings: dict[str, str | int | float | bool | None]
    sources: tuple[SourceFile, ...]
    splits: dict[Split, tuple[Shard, ...]]

    def total(self, split: Split, what: Literal["tokens", "documents", "text_bytes", "trained_tokens"]) -> int:
        """A sum over the shards of a split; 0 where there is no such split."""
        return sum(int(getattr(shard, what)) for shard in self.splits.get(split, ()))


class ShardWriter:
    """Writes one split as a row of shards, holding no more than a few numbers a document."""

    def __init__(self, folder: Path, split: str, dtype: str, vocab_size: int, limit: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.limit, self.vocab_size = folder, split, limit, vocab_size
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards: list[Shard] = []
        self._ends: list[int] = []
        self._text_bytes: list[int] = []
        self._text_tokens: list[int] = []
        self._tokens = self._trained = 0
        self._bits = np.empty(0, bool)  # fewer than eight flags that do not fill a byte yet
        self._waiting: dict[Ending, bytearray] = {"bin": bytearray(), "idx": bytearray(), "mask": bytearray()}
        self._digests = {ending: hashlib.sha256() for ending in self._waiting}

    def add(self, ids: list[int], trained: bool) -> None:
        """Append ids to the present document; raises UserError where an id is outside the vocabulary."""
        if not ids:
            return
        values = np.array(ids, dtype=np.int64)
        if values.min() < 0 or values.max() >= self.vocab_size:
            raise UserError(
                f"the tokenizer gave the id {int(values.max())}, but says its vocabulary has {self.vocab_size} entries; the tokenizer's "
                "files do not belong together: load or train it again."
            )
        self._write("bin", values.astype(self.dtype).tobytes())
        bits = np.concatenate([self._bits, np.full(len(ids), trained)])
        whole = len(bits) // 8 * 8
        self._write("mask", np.packbits(bits[:whole]).tobytes())
        self._bits = bits[whole:]
        self._tokens += len(ids)
        self._trained += len(ids) if trained else 0

    def end_document(self, text_bytes: int, text_tokens: int) -> None:
        """Close the present document; one without tokens leaves no trace."""
        if self._tokens == (self._ends[-1] if self._ends else 0):
            return
        self._ends.append(self._tokens)
        self._text_bytes.append(text_bytes)
        self._text_tokens.append(text_tokens)
        if self._tokens >= self.limit:
            self._close_shard()

    def finish(self) -> tuple[Shard, ...]:
        """Close the last shard and return all of them."""
        if self._ends:
            self._close_shard()
        return tuple(self.shards)

    def _write(self, ending: Ending, data: bytes, flush: bool = False) -> None:
        """Append to one of the shard's files, a megabyte at a time."""
        waiting = self._waiting[ending]
        waiting += data
        if flush or len(waiting) > 1 << 20:
            with open(self._path(ending), "ab") as file:
                file.write(waiting)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            self._digests[ending].update(waiting)
            waiting.clear()

    def _path(self, ending: Ending) -> Path:
        return self.folder / f"{self._name}.{ending}"

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}"

    def _close_shard(self) -> None:
        columns = np.array([self._ends, self._text_bytes, self._text_tokens], dtype="<i8")
        self._write("bin", b"", flush=True)
        self._write("idx", columns.tobytes(), flush=True)
        self._write("mask", np.packbits(self._bits).tobytes(), flush=True)
        digests = {ending: digest.hexdigest() for ending, digest in self._digests.items()}
        masked = self._trained < self._tokens
        if not masked:
            self._path("mask").unlink()
            del digests["mask"]
        self.shards.append(
            Shard(
                name=self._name,
                tokens=self._tokens,
                documents=len(self._ends),
                text_bytes=sum(self._text_bytes),
                trained_tokens=self._trained,
                masked=masked,
                sha256=digests,
            )
        )
        self._ends, self._text_bytes, self._text_tokens = [], [], []
        self._tokens = self._trained = 0
        self._bits = np.empty(0, bool)
        self._digests = {ending: hashlib.sha256() for ending in self._waiting}


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder holds prepared data, judged by its manifest's first lines."""
    path = Path(folder) / INDEX
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b'"weft-shards"' in file.read(200)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check index.json; raises UserError where it is missing, damaged or of another version."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; make one with `weft data prepare`.")
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has no {INDEX}, so it is not prepared data; make one with `weft data prepare`.")
    try:
        data = json.loads(read_text(folder / INDEX, "manifest"))
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / INDEX} is damaged (line {error.lineno}: {error.msg}); prepare the data again.") from None
    manifest: Manifest = parse(Manifest, data, str(folder / INDEX))
    return manifest


def open_shards(folder: str | Path, split: Split = "train", tokenizer_sha256: str | None = None) -> TokenStore:
    """Map one split of a prepared folder into memory.

    tokenizer_sha256   the fingerprint that the shards must have been made with; None accepts any.
    Raises UserError for a folder without such a split, shards of another tokenizer, and files of the wrong size.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if tokenizer_sha256 is not None and tokenizer_sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{folder} was made with another tokenizer ({manifest.tokenizer.source}, {manifest.tokenizer.vocab_size} entries, fingerprint "
            f"{manifest.tokenizer.sha256[:12]}) than the one in use ({tokenizer_sha256[:12]}); prepare the data with the one in use."
        )
    if not manifest.splits.get(split):
        if split not in ("train", "valid"):
            raise unknown("split", split, ("train", "valid"))
        raise UserError(f"{folder} has no {split} split; prepare it again with --valid SHARE, or with a valid.jsonl beside train.jsonl.")
    parts = [_open_shard(folder, shard, manifest.dtype) for shard in manifest.splits[split]]
    vocab, table = manifest.tokenizer.vocab_size, None
    if manifest.exact_bytes:
        _check_size(folder / TOKEN_BYTES, 4 * vocab)
        table = map_array(folder / TOKEN_BYTES, "int32", vocab)
    marks = Marks(manifest.tokenizer.bos, manifest.tokenizer.eos)
    digests = json.dumps([dict(sorted(shard.sha256.items())) for shard in manifest.splits[split]])
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return TokenStore(parts, marks, table, manifest.prefix_bytes, str(folder), manifest.tokenizer.sha256, digest)


def verify(folder: str | Path) -> int:
    """Compare every shard file with its digest; returns how many were read, raises UserError naming one that differs."""
    folder, count = Path(folder), 0
    for shard in (shard for shards in read_manifest(folder).splits.values() for shard in shards):
        for ending, digest in shard.sha256.items():
            path = folder / f"{shard.name}.{ending}"
            if not path.is_file():
                raise UserError(f"{path} is missing; prepare the data again.")
            if sha256(path) != digest:
                raise UserError(f"{path} is not what was written (its SHA-256 differs); prepare the data again.")
            count += 1
    return count


def _open_shard(folder: Path, shard: Shard, dtype: str) -> Part:
    documents, path = shard.documents, folder / shard.name
    _check_size(path.with_suffix(".bin"), shard.tokens * np.dtype(dtype).itemsize)
    _check_size(path.with_suffix(".idx"), documents * 24)
    if shard.masked:
        _check_size(path.with_suffix(".mask"), -(-shard.tokens // 8))
    tokens = map_array(path.with_suffix(".bin"), dtype, shard.tokens)
    index = map_array(path.with_suffix(".idx"), "int64", documents * 3)
    mask = map_array(path.with_suffix(".mask"), "uint8", -(-shard.tokens // 8)) if shard.masked else None
    if index[documents - 1] != shard.tokens:
        raise UserError(
            f"{path.with_suffix('.idx')} ends at token {int(index[documents - 1])}, not {shard.tokens}; prepare the data again."
        )
    return Part(tokens, index[:documents], index[documents : 2 * documents], index[2 * documents :], mask)


def _check_size(path: Path, expected: int) -> None:
    """Raise UserError where a file is not exactly as long as the manifest says."""
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again.")
    size = path.stat().st_size
    if size != expected:
        what = "cut short" if size < expected else "longer than it was written"
        raise UserError(f"{path} is {what}: it has {size:,} bytes and should have {expected:,}; prepare the data again.")
