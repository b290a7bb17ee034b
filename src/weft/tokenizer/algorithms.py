"""BPE, Unigram and WordPiece written out plainly, step by step: what `weft tokenizer explain` draws.

These are the naive twins of the library's fast versions, and tests hold the two equal. BPE here takes quadratic time.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Merge:
    """One merge: its place in the list of merges, the two symbols, and the row of symbols after it."""

    rank: int
    left: str
    right: str
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class Segmentation:
    """Pieces of a text with their log-probabilities (natural), and the sum."""

    pieces: tuple[str, ...]
    log_probs: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class Match:
    """One step of WordPiece: what was left of the word, the candidates tried in order, and the piece found (None: none)."""

    rest: str
    tried: tuple[str, ...]
    piece: str | None


def bpe_start(word: str, model: Mapping[str, object], vocab: Mapping[str, int]) -> tuple[str, ...]:
    """The symbols that merging begins with: characters, with the vocabulary's prefix and suffix, or their bytes, or the unknown token.

    model   the `model` object of a tokenizer.json of type BPE.
    """
    prefix, suffix = str(model.get("continuing_subword_prefix") or ""), str(model.get("end_of_word_suffix") or "")
    unk, symbols, last_unknown = model.get("unk_token"), [], False
    for index, char in enumerate(word):
        symbol = (prefix if index else "") + char + (suffix if index == len(word) - 1 else "")
        in_bytes = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        if symbol in vocab:
            symbols.append(symbol)
        elif model.get("byte_fallback") and all(token in vocab for token in in_bytes):
            symbols += in_bytes
        elif unk is not None:
            if not (model.get("fuse_unk") and last_unknown):
                symbols.append(str(unk))
            last_unknown = True
            continue
        last_unknown = False
    return tuple(symbols)


def bpe_merges(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int], prefix: str = "") -> list[Merge]:
    """Sennrich et al. 2016, algorithm 1 at encoding time: join the neighbours of lowest rank, the leftmost first, until none has one."""
    row = list(symbols)
    merges: list[Merge] = []
    while True:
        candidates = [(rank, at) for at, pair in enumerate(itertools.pairwise(row)) if (rank := ranks.get(pair)) is not None]
        if not candidates:
            return merges
        rank, at = min(candidates)
        left, right = row[at : at + 2]
        row[at : at + 2] = [left + right[len(prefix) :]]
        merges.append(Merge(rank, left, right, tuple(row)))


def unigram_segmentations(text: str, scores: Mapping[str, float], unk_score: float, count: int = 2) -> list[Segmentation]:
    """The `count` most probable segmentations (Kudo 2018, section 3.2, by the Viterbi algorithm with several survivors a place).

    A character that no piece stands for alone is unknown, at `unk_score`; neighbouring unknown characters make one piece.
    """
    longest = max(map(len, scores), default=1)
    # survivors[i]: (score, where the last piece begins, which survivor there) of the best ways to cover text[:i]
    survivors: list[list[tuple[float, int, int]]] = [[(0.0, -1, -1)]]
    for end in range(1, len(text) + 1):
        found = []
        for begin in range(max(0, end - longest), end):
            step = scores.get(text[begin:end], unk_score if end - begin == 1 else None)
            if step is not None:
                found += [(score + step, begin, rank) for rank, (score, *_) in enumerate(survivors[begin])]
        # On a tie the longer last piece stays, as in a search that goes forward and replaces only what is worse.
        survivors.append(sorted(found, key=lambda entry: (-entry[0], entry[1]))[:count])
    return [_trace(text, survivors, rank, scores, unk_score) for rank in range(len(survivors[-1]))] if text else []


def _trace(
    text: str, survivors: Sequence[Sequence[tuple[float, int, int]]], rank: int, scores: Mapping[str, float], unk_score: float
) -> Segmentation:
    pieces: list[str] = []
    values: list[float] = []
    at, total = len(text), survivors[-1][rank][0]
    while at > 0:
        _, begin, before = survivors[at][rank]
        piece = text[begin:at]
        if piece not in scores and pieces and pieces[-1] not in scores:
            pieces[-1], values[-1] = piece + pieces[-1], values[-1] + unk_score
        else:
            pieces.append(piece)
            values.append(scores.get(piece, unk_score))
        at, rank = begin, before
    return Segmentation(tuple(reversed(pieces)), tuple(reversed(values)), total)


def odds(better: Segmentation, worse: Segmentation) -> float:
    """How many times more probable one segmentation is than another."""
    return math.exp(min(better.score - worse.score, 700.0))


def word_piece_matches(word: str, vocab: Mapping[str, int], prefix: str, longest: int) -> list[Match]:
    """Devlin et al. 2019: the longest piece that begins what is left, again and again; one failure makes the word unknown.

    longest   words of more characters than this are not tried at all.
    """
    if len(word) > longest:
        return [Match(word, (), None)]
    matches, at = [], 0
    while at < len(word):
        tried = []
        for end in range(len(word), at, -1):
            tried.append((prefix if at else "") + word[at:end])
            if tried[-1] in vocab:
                break
        found = tried[-1] if tried[-1] in vocab else None
        matches.append(Match(word[at:], tuple(tried), found))
        if found is None:
            break
        at = end
    return matches
