"""SentencePiece models (Kudo and Richardson 2018): the `.model` file, its normalisation, and both of its algorithms.

The file is read here, so nothing has to be installed for it. The `tokenizers` library runs Unigram and BPE; what it does only nearly
as SentencePiece does (the character map on grapheme clusters, control and byte pieces that could be spelled in a text) is done by
`SentencePieceEncoder`.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from weft.errors import UserError
from weft.tokenizer.huggingface import collapse_spaces, with_configuration
from weft.tokenizer.token_text import SPACE_MARK
from weft.tokenizer.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True)
class Piece:
    """A vocabulary entry: its text, its log-probability (Unigram) or negative rank (BPE), and its kind (NORMAL to BYTE above)."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class Model:
    """What a `.model` file holds; field names and defaults as in sentencepiece_model.proto."""

    pieces: tuple[Piece, ...]
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @property
    def unk_id(self) -> int | None:
        return next((index for index, piece in enumerate(self.pieces) if piece.kind == UNKNOWN), None)

    @property
    def bytes_to_ids(self) -> dict[int, int]:
        """Byte -> id of its piece, such as `<0x0A>`."""
        found = {index: re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece.text) for index, piece in enumerate(self.pieces) if piece.kind == BYTE}
        return {int(match[1], 16): index for index, match in found.items() if match}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protobuf message: ints for varints, bytes for everything else."""
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 70:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise ValueError("a number of more than ten bytes")

    while at < end:
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(wire) if wire != 2 else varint()
        if length is None or at + length > end:
            raise ValueError("a field that runs past the end")
        yield key >> 3, data[at : at + length]
        at += length


def read_model(path: Path) -> Model:
    """Read a `.model` file; raises UserError where it is missing, cut short or something else."""
    try:
        data = path.read_bytes()
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(data):
            if number == 1:
                entry = {2: struct.pack("<f", 0.0), 3: NORMAL, **dict(_fields(value))}
                pieces.append(Piece(entry[1].decode(), struct.unpack("<f", entry[2])[0], entry[3]))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give the path of a SentencePiece .model file.") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not a whole SentencePiece model ({error or type(error).__name__}); fetch it again.") from None
    if not pieces or trainer.get(3, UNIGRAM) not in (UNIGRAM, BPE) or not normalizer.get(5, 1):
        raise UserError(f"{path} holds no Unigram or BPE model with marked spaces; those are the SentencePiece models that can be used.")
    return Model(
        pieces=tuple(pieces),
        model_type=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        treat_whitespace_as_suffix=bool(trainer.get(24, 0)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


class CharacterMap:
    """SentencePiece's precompiled character map: the longest prefix that has a rule is replaced, then the next, byte by byte.

    The blob is the size of a double array in bytes (uint32), the array (uint32 units of darts-clone) and replacements that end in NUL.
    """

    def __init__(self, blob: bytes) -> None:
        size = struct.unpack_from("<I", blob)[0] if len(blob) >= 4 else 0
        if blob and (size % 4 or not 4 <= size <= len(blob) - 4):
            raise UserError("the SentencePiece model's character map is damaged; fetch the model again.")
        self._units = struct.unpack(f"<{size // 4}I", blob[4 : 4 + size])
        self._replacements = blob[4 + size :]
        inert = [chr(code) for code in range(128) if not self._units or not self._begins_rule(code)]
        # A character that begins no rule with what follows is its own image; only such ASCII runs are told at a glance.
        self._inert = re.compile(b"[" + re.escape("".join(inert)).encode() + rb"]+(?=[\x00-\x7f]|\Z)") if inert else None

    def _child(self, node: int, byte: int) -> int | None:
        unit = self._units[node]
        node ^= ((unit >> 10) << ((unit & 0x200) >> 6)) ^ byte
        return node if node < len(self._units) and self._units[node] & 0x800000FF == byte else None

    def _begins_rule(self, code: int) -> bool:
        """Whether an ASCII character has a rule alone or before another ASCII character."""
        node = self._child(0, code) if code else None
        if node is None:
            return False
        return bool(self._units[node] & 0x100) or any(self._child(node, byte) is not None for byte in range(1, 128))

    def _longest(self, data: bytes, start: int) -> tuple[int, int]:
        """Length of the longest prefix with a rule, and where its replacement begins."""
        node = length = value = 0
        for at in range(start, len(data)):
            child = self._child(node, data[at]) if data[at] else None
            if child is None:
                break
            node = child
            unit = self._units[node]
            if unit & 0x100:
                leaf = node ^ ((unit >> 10) << ((unit & 0x200) >> 6))
                length, value = at - start + 1, self._units[leaf] & 0x7FFFFFFF
        return length, value

    def __call__(self, text: str) -> str:
        if not self._units:
            return text
        data, out, at = text.encode(), bytearray(), 0
        while at < len(data):
            run = self._inert.match(data, at) if self._inert else None
            if run:
                out += run[0]
                at = run.end()
                continue
            length, value = self._longest(data, at)
            if length:
                out += self._replacements[value : self._replacements.index(0, value)]
            else:
                length = 1 if data[at] < 0x80 else 2 if data[at] < 0xE0 else 3 if data[at] < 0xF0 else 4
                out += data[at : at + length]
            at += length
        return out.decode()


class Normalizer:
    """What SentencePiece does to a text before it looks for pieces; user-defined pieces pass the character map unchanged."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._map = CharacterMap(model.charsmap)
        kept = sorted((piece.text for piece in model.pieces if piece.kind == USER_DEFINED), key=len, reverse=True)
        self._kept = re.compile("(" + "|".join(map(re.escape, kept)) + ")") if kept else None

    def __call__(self, text: str) -> str:
        suffix = self._model.treat_whitespace_as_suffix
        parts = self._kept.split(text) if self._kept else [text]
        mapped = "".join(part if index % 2 else self._map(part) for index, part in enumerate(parts))
        if self._model.remove_extra_whitespaces:
            # The package stops skipping spaces at the first character that is none, even one that its map deletes.
            deletes = suffix and any(self._map(char) == "" for char in text)
            mapped = re.sub(" {2,}", " ", mapped).strip(" ")
        else:
            deletes = False
        if (mapped or deletes) and self._model.add_dummy_prefix:
            mapped = mapped + " " if suffix else " " + mapped
        return mapped.replace(" ", SPACE_MARK)


class SentencePieceEncoder:
    """Text to ids exactly as the `sentencepiece` package does; with `special`, control pieces (and the unknown one) that
    are spelled in the text are read first."""

    def __init__(self, model: Model) -> None:
        self.normalize = Normalizer(model)
        self.bytes_to_ids = model.bytes_to_ids if model.byte_fallback else {}
        self.unk_id = model.unk_id
        hidden = (UNKNOWN, CONTROL, BYTE)
        # No normalised text has a space, so a piece that must not be found in a text is hidden behind one.
        pieces = [Piece(" " + piece.text, piece.score, piece.kind) if piece.kind in hidden else piece for piece in model.pieces]
        self.backend = tokenizers.Tokenizer(_library_model(pieces, model, byte_fallback=False))
        self.backend.add_tokens([AddedToken(piece.text, normalized=False) for piece in pieces if piece.kind == USER_DEFINED])
        self._control = {piece.text: index for index, piece in enumerate(model.pieces) if piece.kind in (CONTROL, UNKNOWN)}
        names = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def __call__(self, text: str, special: bool) -> list[int]:
        if not special or self._pattern is None:
            return self._encode(text)
        ids: list[int] = []
        for index, part in enumerate(self._pattern.split(text)):
            ids += [self._control[part]] if index % 2 else self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        text = self.normalize(text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        if not self.bytes_to_ids or self.unk_id not in encoding.ids:
            return encoding.ids
        ids: list[int] = []
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            ids += [self.bytes_to_ids[byte] for byte in text[start:end].encode()] if index == self.unk_id else [index]
        return ids


def score_merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """BPE merges of scored pieces: every way to make a piece of two others, the best score first."""
    known = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    merges = []
    for piece in sorted((piece for piece in pieces if piece.kind in (NORMAL, UNUSED)), key=lambda piece: -piece.score):
        for cut in range(len(piece.text) - 1, 0, -1):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in known and right in known:
                merges.append((left, right))
    return merges


def _library_model(pieces: Sequence[Piece], model: Model, byte_fallback: bool) -> models.Model:
    unk = model.unk_id
    if model.model_type == UNIGRAM:
        return models.Unigram([(piece.text, piece.score) for piece in pieces], unk_id=unk, byte_fallback=byte_fallback)
    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    bpe = models.BPE(vocab=vocab, merges=score_merges(pieces), fuse_unk=True, byte_fallback=byte_fallback)
    if unk is not None:
        bpe.unk_token = pieces[unk].text
    return bpe


def space_decoder(strip_first: bool) -> decoders.Decoder:
    """Marked spaces to spaces, byte tokens to bytes, and the space that the prefix put first dropped."""
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip_first else steps)


def marked_spaces(prefix: bool) -> normalizers.Normalizer:
    """Spaces as `▁`, with one before every text if `prefix`."""
    first = [normalizers.Prepend(SPACE_MARK)] if prefix else []
    return normalizers.Sequence([*first, normalizers.Replace(" ", SPACE_MARK)])


def library_backend(model: Model) -> tokenizers.Tokenizer:
    """The model in terms of the `tokenizers` library, as it is saved for other readers."""
    backend = tokenizers.Tokenizer(_library_model(model.pieces, model, model.byte_fallback))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    steps += [collapse_spaces()] if model.remove_extra_whitespaces else []
    prefix = model.add_dummy_prefix and not model.treat_whitespace_as_suffix
    backend.normalizer = normalizers.Sequence([*steps, marked_spaces(prefix)])
    backend.decoder = space_decoder(prefix)
    backend.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind != USER_DEFINED)
            for piece in model.pieces
            if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return backend


def tokenizer_from_model(model: Model, folder: Path | None = None) -> Tokenizer:
    """A tokenizer from a read model and the configuration files of its folder."""
    texts = [piece.text for piece in model.pieces]
    if len(set(texts)) != len(texts):
        raise UserError("the SentencePiece model has the same piece twice; no id would belong to it. Fetch the model again.")
    return with_configuration(library_backend(model), folder, SentencePieceEncoder(model))


def from_sentencepiece(path: Path) -> Tokenizer:
    """A `.model` file; BOS and templates come from the configuration files beside it, and are left out where there are none."""
    return tokenizer_from_model(read_model(path), path.parent if (path.parent / "tokenizer_config.json").is_file() else None)
