"""How a text becomes tokens, as data: the words it is cut into, and every step of the algorithm in each."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers

from weft.errors import UserError
from weft.tokenizer.algorithms import (
    Match,
    Merge,
    Segmentation,
    bpe_merges,
    bpe_start,
    unigram_segmentations,
    word_piece_matches,
)
from weft.tokenizer.sentencepiece import SentencePieceEncoder
from weft.tokenizer.tokenizer import Tokenizer, check_unicode

MAX_CHARACTERS = 2000


@dataclass(frozen=True)
class Word:
    """One word of a text, cut before the algorithm runs, and what the algorithm did with it.

    text            the word as the algorithm sees it: after normalisation, and in GPT-2's alphabet for byte-level vocabularies.
    start, merges   BPE: the symbols at the beginning, and the merges in their order.
    segmentations   Unigram: the best one and the runner-up.
    matches         WordPiece: the longest matches.
    note            why no step was taken, where none was.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    start: tuple[str, ...] = ()
    merges: tuple[Merge, ...] = ()
    segmentations: tuple[Segmentation, ...] = ()
    matches: tuple[Match, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """The steps from a text to its ids; `kind` is BPE, Unigram or WordPiece."""

    kind: str
    text: str
    words: tuple[Word, ...] = field(default_factory=tuple)

    @property
    def ids(self) -> list[int]:
        return [index for word in self.words for index in word.ids]


class Explainer:
    """Takes texts apart with one tokenizer; reading its tables takes a fraction of a second, which is spent once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        encoder = tokenizer.text_encoder
        self._tokenizer = tokenizer
        self._exact = encoder if isinstance(encoder, SentencePieceEncoder) else None
        model = json.loads(tokenizer.backend.to_str())["model"]
        self.kind = str(model["type"])
        if self.kind not in _WORKERS:
            raise UserError(f"this tokenizer's model is {self.kind}; the steps of BPE, Unigram and WordPiece can be explained.")
        names = {tokenizer.token(index) for index in tokenizer.special_ids}
        hidden = {name for name in names if name is not None}
        if self._exact:
            hidden |= {f"<0x{byte:02X}>" for byte in self._exact.bytes_to_ids}
        self._work = _WORKERS[self.kind](model, hidden)

    def __call__(self, text: str) -> Explanation:
        """Every step from a text to its ids, which are those of `tokenizer.encode(text, bos=False)`.

        Raises UserError for a text of more than 2,000 characters, whose steps nobody reads.
        """
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"the text has {len(text)} characters; explain at most {MAX_CHARACTERS} at a time.")
        check_unicode(text)
        words: list[Word] = []
        for part, added in _parts(self._tokenizer, self._exact.normalize(text) if self._exact else text):
            if added is not None:
                words.append(Word(part, (part,), (added,), note="stands in the vocabulary as a whole"))
            else:
                words += [self._work(word) for word in ([part] if self._exact else _cut(self._tokenizer.backend, part))]
        return Explanation(self.kind, text, tuple(words))


def _parts(tokenizer: Tokenizer, text: str) -> Iterator[tuple[str, int | None]]:
    """Text between added tokens with None, and added tokens with their ids; special ones count as text."""
    tokens = tokenizer.backend.get_added_tokens_decoder()
    added = {token.content: (index, token) for index, token in tokens.items() if index not in tokenizer.special_ids}
    if not added:
        yield from [(text, None)] if text else []
        return
    patterns = []
    for content, (_, token) in sorted(added.items(), key=lambda item: -len(item[0])):
        edge = r"\b" if token.single_word else ""
        patterns.append((r"\s*" if token.lstrip else "") + edge + re.escape(content) + edge + (r"\s*" if token.rstrip else ""))
    at = 0
    for match in re.finditer("|".join(patterns), text):
        if match.start() > at:
            yield text[at : match.start()], None
        name = match[0] if match[0] in added else match[0].strip()
        yield name, added[name][0]
        at = match.end()
    if at < len(text):
        yield text[at:], None


def _cut(backend: tokenizers.Tokenizer, text: str) -> list[str]:
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer else text
    if not normalized:
        return []
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)] if backend.pre_tokenizer else [normalized]


def _bpe(model: Mapping[str, Any], hidden: set[str]) -> Callable[[str], Word]:
    vocab = model["vocab"]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    prefix = model.get("continuing_subword_prefix") or ""

    def work(word: str) -> Word:
        if model.get("ignore_merges") and word in vocab:
            return Word(word, (word,), (vocab[word],), note="stands in the vocabulary as a whole, which comes before merging")
        start = bpe_start(word, model, vocab)
        merges = tuple(bpe_merges(start, ranks, prefix))
        tokens = merges[-1].symbols if merges else start
        return Word(word, tokens, tuple(vocab[token] for token in tokens), start, merges)

    return work


def _unigram(model: Mapping[str, Any], hidden: set[str]) -> Callable[[str], Word]:
    ids = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    unk = None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    scores = {piece: score for piece, score in model["vocab"] if piece not in hidden and piece != unk}
    unk_score = min(score for _, score in model["vocab"]) - 10.0  # the library's and SentencePiece's penalty

    def spelled(piece: str) -> list[str]:
        in_bytes = [f"<0x{byte:02X}>" for byte in piece.encode()]
        if piece in scores:
            return [piece]
        return in_bytes if model.get("byte_fallback") and all(token in ids for token in in_bytes) else [str(unk)]

    def work(word: str) -> Word:
        found = tuple(unigram_segmentations(word, scores, unk_score))
        tokens = [token for piece in (found[0].pieces if found else ()) for token in spelled(piece)]
        return Word(word, tuple(tokens), tuple(ids[token] for token in tokens), segmentations=found)

    return work


def _word_piece(model: Mapping[str, Any], hidden: set[str]) -> Callable[[str], Word]:
    vocab, unk, longest = model["vocab"], model["unk_token"], model["max_input_chars_per_word"]

    def work(word: str) -> Word:
        matches = tuple(word_piece_matches(word, vocab, model["continuing_subword_prefix"], longest))
        pieces = [match.piece for match in matches]
        tokens = tuple(piece for piece in pieces if piece is not None) if None not in pieces else (unk,)
        note = f"has more than {longest} characters" if len(word) > longest else ""
        return Word(word, tokens, tuple(vocab[token] for token in tokens), matches=matches, note=note)

    return work


_WORKERS: dict[str, Callable[[Mapping[str, Any], set[str]], Callable[[str], Word]]] = {
    "BPE": _bpe,
    "Unigram": _unigram,
    "WordPiece": _word_piece,
}
