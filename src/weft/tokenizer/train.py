"""New vocabularies from text: byte-level BPE, WordPiece and Unigram, trained by the `tokenizers` library.

The same text gives the same vocabulary every time. The library's BPE trainer does that by itself; the order in which its other two
see words and characters changes from run to run, so here WordPiece is trained as the BPE that it is, over characters marked as
continuing a word, and Unigram's result is put in an order of its own.
"""

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from weft.errors import UserError, unknown
from weft.tokenizer.huggingface import set_frame, word_piece
from weft.tokenizer.sentencepiece import marked_spaces, space_decoder
from weft.tokenizer.special import guess_roles
from weft.tokenizer.splits import TRAINING_SPLITS, byte_level_split, training_pattern
from weft.tokenizer.tokenizer import Settings, Tokenizer, check_unicode

Kind = Literal["bpe", "wordpiece", "unigram"]
KINDS: tuple[Kind, ...] = ("bpe", "wordpiece", "unigram")
# Bytes of text that training stops at unless told otherwise: more changes a vocabulary little, and takes time and memory.
SAMPLE_BYTES: dict[str, int] = {"bpe": 200_000_000, "wordpiece": 200_000_000, "unigram": 20_000_000}
SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "bpe": ("<|endoftext|>",),
    "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "unigram": ("<unk>", "<s>", "</s>"),
}
_REQUIRED = {"bpe": (), "wordpiece": ("[UNK]",), "unigram": ("<unk>",)}

_MAX_ALPHABET = 1000
_COVERAGE = 0.9995  # share of a text's characters that Unigram has pieces for; SentencePiece's default
_BYTE_SCORE = -1000.0  # below every other way to spell `<0x0A>`, so that a byte piece stands for a byte alone
_WORDS = r"\n+|▁*[^▁\n]+|▁+"
_CONTINUES = 0xF0000  # planes 15 and 16 are private: room for 131,068 continuing characters


@dataclass
class Read:
    """What training has read: texts, their UTF-8 bytes, and whether it stopped before the end."""

    texts: int = 0
    num_bytes: int = 0
    stopped: bool = False


def train_tokenizer(
    kind: Kind,
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] | None = None,
    *,
    split: str = "llama3",
    digits: int | None = None,
    min_frequency: int = 2,
    lowercase: bool = False,
    sample_bytes: int | None = None,
    read: Read | None = None,
) -> Tokenizer:
    """Train a vocabulary; texts are read once, as a stream.

    kind             `bpe` (byte-level, Sennrich et al. 2016 and Radford et al. 2019), `wordpiece` (Schuster and Nakajima 2012, with
                     BERT's rules) or `unigram` (Kudo 2018, with a piece for every byte, so that nothing is unknown).
    vocab_size       entries in all, special tokens among them; a small text may give fewer.
    special_tokens   in the order of their ids, which begin at 0; None for the kind's own (`SPECIAL_TOKENS`).
    split, digits    how BPE cuts text into words; see `weft.tokenizer.splits.training_pattern`.
    min_frequency    pairs seen less often are not merged (BPE, WordPiece).
    lowercase        WordPiece: fold case and drop accents first.
    sample_bytes     stop reading after so many bytes of UTF-8; None for the kind's default (`SAMPLE_BYTES`).
    read             filled with how much was read.
    Raises UserError for no text, a vocabulary too small for the bytes or characters, and lone surrogates.
    """
    if kind not in KINDS:
        raise unknown("kind of tokenizer", str(kind), KINDS)
    if split not in TRAINING_SPLITS:
        raise unknown("way to split text", str(split), TRAINING_SPLITS)
    if (digits is not None and digits < 0) or min_frequency < 1:
        raise UserError(f"digits is {digits} and min_frequency {min_frequency}; give at least 0 digits and a frequency of at least 1.")
    special = _special_tokens(kind, special_tokens)
    read = read if read is not None else Read()
    stream = _limited(texts, SAMPLE_BYTES[kind] if sample_bytes is None else sample_bytes, read)
    if kind == "bpe":
        backend = _train_bpe(stream, vocab_size, special, training_pattern(split, digits), min_frequency)
    elif kind == "wordpiece":
        backend = _train_word_piece(stream, vocab_size, special, min_frequency, lowercase)
    else:
        backend = _train_unigram(stream, vocab_size, special)
    roles = guess_roles(set(special))
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    if kind == "wordpiece" and "cls_token" in roles and "sep_token" in roles:
        prefix, suffix = (special.index(roles["cls_token"]),), (special.index(roles["sep_token"]),)
    elif "bos_token" in roles:
        prefix = (special.index(roles["bos_token"]),)
        set_frame(backend, prefix, suffix)
    return Tokenizer(backend, Settings(roles, prefix, suffix))


def _special_tokens(kind: Kind, given: Sequence[str] | None) -> list[str]:
    tokens = list(SPECIAL_TOKENS[kind] if given is None else given)
    if len(set(tokens)) != len(tokens) or not all(tokens):
        raise UserError(f"the special tokens are {', '.join(map(repr, tokens))}; give each once, and none empty.")
    return [*(token for token in _REQUIRED[kind] if token not in tokens), *tokens]


def _limited(texts: Iterable[str], limit: int, read: Read) -> Iterator[str]:
    """Texts up to `limit` bytes, counted; raises UserError where there are none."""
    if limit < 1:
        raise UserError(f"the sample is {limit} bytes; give 1 or more.")
    for text in texts:
        if read.num_bytes >= limit:
            read.stopped = True
            return
        check_unicode(text)
        size = len(text.encode())
        if size > limit - read.num_bytes:
            text = text.encode()[: limit - read.num_bytes].decode("utf-8", "ignore")
            size, read.stopped = len(text.encode()), True
        if text:
            read.texts += 1
            read.num_bytes += size
            yield text
        if read.stopped:
            return
    if not read.num_bytes:
        raise UserError("there is no text to train on; give files with text in them.")


def _require(vocab_size: int, least: int, why: str) -> None:
    if vocab_size < least:
        raise UserError(f"a vocabulary of {vocab_size} is too small: {why} need {least}; give a vocab-size of {least} or more.")


def _train_bpe(texts: Iterator[str], vocab_size: int, special: list[str], pattern: str, min_frequency: int) -> tokenizers.Tokenizer:
    _require(vocab_size, 256 + len(special), f"the 256 bytes and {len(special)} special token{'s' * (len(special) != 1)}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level_split([pattern])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=min_frequency,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


class _Spool:
    """Texts on disk with their characters counted: for training that has to know the alphabet before it begins."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `_spooled`)
        self.counts: Counter[str] = Counter()

    def fill(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.counts.update(text)
            data = text.encode()
            self._file.write(len(data).to_bytes(8, "little") + data)

    def alphabet(self, limit: int, coverage: float = 1.0) -> set[str]:
        """The most frequent characters, at most `limit`, that together make up `coverage` of the text."""
        kept: set[str] = set()
        needed = coverage * sum(self.counts.values())
        for char, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            if needed <= 0 or len(kept) == limit:
                break
            kept.add(char)
            needed -= count
        return kept

    def __iter__(self) -> Iterator[str]:
        self._file.seek(0)
        while size := self._file.read(8):
            yield self._file.read(int.from_bytes(size, "little")).decode()

    def close(self) -> None:
        self._file.close()


@contextmanager
def _spooled(texts: Iterable[str]) -> Iterator[_Spool]:
    spool = _Spool()
    try:
        spool.fill(texts)
        yield spool
    finally:
        spool.close()


class _Continuing:
    """A private character for every character that continues a word, given out in the order of first appearance."""

    def __init__(self) -> None:
        self._marks: dict[int, str] = {}
        self._originals: dict[str, str] = {}

    def mark(self, word: str) -> str:
        """A word with every character but the first marked; empty where the private characters are in the text or used up."""
        if any(ord(char) >= _CONTINUES for char in word):
            return ""
        for char in word[1:]:
            if ord(char) not in self._marks:
                code = _CONTINUES + len(self._marks)
                if code > 0x10FFFD:
                    return ""
                self._marks[ord(char)] = chr(code)
                self._originals[chr(code)] = char
        return word[0] + word[1:].translate(self._marks)

    def spelled(self, token: str) -> str:
        """A token of marked characters in WordPiece's spelling."""
        plain = "".join(self._originals.get(char, char) for char in token)
        return "##" + plain if token[0] in self._originals else plain


def _train_word_piece(
    texts: Iterator[str], vocab_size: int, special: list[str], min_frequency: int, lowercase: bool
) -> tokenizers.Tokenizer:
    _require(vocab_size, len(special) + 2, f"{len(special)} special tokens and a character at the beginning and inside of words")
    rules = word_piece({token: index for index, token in enumerate(special)}, lowercase)
    marks = _Continuing()

    def marked() -> Iterator[str]:
        for text in texts:
            words = rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text))
            yield " ".join(marks.mark(word) for word, _ in words)

    with _spooled(marked()) as spool:
        spool.counts.pop(" ", None)
        alphabet = spool.alphabet(min(_MAX_ALPHABET, max(2, (vocab_size - len(special)) // 2)))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(special),
            initial_alphabet=sorted(alphabet),
            limit_alphabet=len(alphabet),
            min_frequency=min_frequency,
            show_progress=False,
        )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        # Without a character of its own the rest of a word would join over the gap, so such words are left out.
        bpe.train_from_iterator((" ".join(filter(alphabet.issuperset, text.split(" "))) for text in spool), trainer)
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    vocab = dict.fromkeys([*special, *(marks.spelled(token) for token, _ in learned)])
    backend = word_piece({token: index for index, token in enumerate(vocab)}, lowercase)
    backend.add_special_tokens(special)
    return backend


def _train_unigram(texts: Iterator[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    ascii_characters = [chr(code) for code in range(0x21, 0x7F)]
    reserved = len(special) + 256
    _require(vocab_size, reserved + len(ascii_characters) + 2, f"{len(special)} special tokens, 256 bytes and the ASCII characters")
    with _spooled(texts) as spool:
        room = (vocab_size - reserved - len(ascii_characters)) // 2 + 1
        alphabet = spool.alphabet(room, _COVERAGE) | {" ", "\n", *ascii_characters}
        rare = str.maketrans({char: " " for char in spool.counts if char not in alphabet})
        normalizer = normalizers.Replace(" ", "▁")
        split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
        learner = tokenizers.Tokenizer(models.Unigram())
        learner.normalizer, learner.pre_tokenizer = normalizer, split
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size - reserved + 1,
            special_tokens=["<unk>"],
            unk_token="<unk>",
            initial_alphabet=[*ascii_characters, "▁"],
            show_progress=False,
        )
        learner.train_from_iterator((" " + text.translate(rare) for text in spool), trainer)
    learned = [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"] if piece not in special]
    pieces = [(token, 0.0) for token in special]
    pieces += [(f"<0x{byte:02X}>", _BYTE_SCORE) for byte in range(256)]
    pieces += _in_order(learned)
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>"), byte_fallback=True))
    backend.normalizer = marked_spaces(prefix=True)
    backend.pre_tokenizer = split
    backend.decoder = space_decoder(strip_first=True)
    backend.add_special_tokens(special)
    return backend


def _in_order(pieces: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Pieces by probability, with nothing left of the order in which the library's hash tables gave them.

    Sums in another order differ in the last digits: scores are rounded. Characters that the text gave no probability have the lowest
    score and steps of 0.0001 above it, handed out in hash order: here they get them by code point.
    """
    ranked = sorted(((round(score, 6), piece) for piece, score in pieces), key=lambda item: (-item[0], item[1]))
    lowest = ranked[-1][0]
    at_step: dict[int, list[int]] = {}
    for index, (score, piece) in enumerate(ranked):
        step = round((score - lowest) / 1e-4)
        if len(piece) == 1 and abs(score - lowest - step * 1e-4) < 2e-6:
            at_step.setdefault(step, []).append(index)
    unbroken = itertools.takewhile(at_step.__contains__, itertools.count())
    spare = sorted(index for step in unbroken for index in at_step[step])
    for index, piece in zip(spare, sorted(ranked[index][1] for index in spare), strict=True):
        ranked[index] = (ranked[index][0], piece)
    return [(piece, score) for score, piece in ranked]


def evenly(texts: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the bytes of a stream, taken evenly all along it; everything from a share of 1."""
    seen = taken = 0
    for text in texts:
        size = len(text.encode())
        if share >= 1.0 or taken <= seen * share:
            taken += size
            yield text
        seen += size


def bytes_per_token(tokenizer: Tokenizer, text: str) -> float:
    """UTF-8 bytes that a token stands for on average; higher is a shorter sequence for the same text."""
    return len(text.encode()) / max(1, len(tokenizer.encode(text, bos=False)))
