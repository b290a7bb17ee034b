"""The plain algorithms that are explained give the ids of the fast ones, and read as a lecture."""

import functools

import pytest
from tokenizer_cases import loaded, nasty_strings, trained

from weft.errors import UserError
from weft.tokenizer.algorithms import bpe_merges, unigram_segmentations, word_piece_matches
from weft.tokenizer.drawing import draw, visible
from weft.tokenizer.explain import Explainer

OURS = ("bpe", "wordpiece", "unigram")
PACK = (
    "gpt2/tokenizer.json",
    "ggml-vocab-phi-3.gguf",
    "ggml-vocab-deepseek-coder.gguf",
    "ggml-vocab-bert-bge.gguf",
    "gpt2.tiktoken",
    "sentencepiece-unigram-1000.model",
    "../models/stories260K/tok512.bin",
)


@functools.cache
def explainer(name: str) -> Explainer:
    return Explainer(trained(name) if name in OURS else loaded(name))


@pytest.mark.parametrize("name", [*OURS, *PACK])
def test_the_steps_end_in_the_ids_of_the_library(name: str) -> None:
    explain = explainer(name)
    tokenizer = explain._tokenizer
    texts = nasty_strings()[:: 1 if name in OURS else 3]
    expected = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, expected, strict=True):
        explanation = explain(text)
        assert explanation.ids == ids, repr(text)
        assert [tokenizer.token(index) for index in ids] == [token for word in explanation.words for token in word.tokens]
        assert draw(explanation, tokenizer.style == "byte_level")[-1] == "ids: " + " ".join(map(str, ids))


def test_merging_in_another_order_ends_elsewhere() -> None:
    """Negative control: the ranks matter."""
    ranks = {("a", "b"): 0, ("b", "c"): 1, ("ab", "c"): 2}
    assert bpe_merges("abc", ranks)[-1].symbols == ("abc",)
    assert bpe_merges("abc", {**ranks, ("a", "b"): 3})[-1].symbols == ("a", "bc")


def test_every_merge_in_its_order() -> None:
    merges = bpe_merges("aaab", {("a", "a"): 0, ("aa", "a"): 1, ("aaa", "b"): 2})
    assert [merge.symbols for merge in merges] == [("aa", "a", "b"), ("aaa", "b"), ("aaab",)]
    assert [(merge.rank, merge.left, merge.right) for merge in merges] == [(0, "a", "a"), (1, "aa", "a"), (2, "aaa", "b")]


def test_the_two_most_probable_segmentations() -> None:
    scores = {"a": -2.0, "b": -2.0, "ab": -3.0, "aba": -9.0}
    best, second = unigram_segmentations("aba", scores, -20.0)
    assert (best.pieces, best.score) == (("ab", "a"), -5.0)
    assert (second.pieces, second.score) == (("a", "b", "a"), -6.0)
    assert best.log_probs == (-3.0, -2.0)
    unknown = unigram_segmentations("a漢字b", scores, -20.0)[0]
    assert (unknown.pieces, unknown.score) == (("a", "漢字", "b"), -44.0)
    every = unigram_segmentations("aba", scores, -20.0, count=10)
    assert [segmentation.score for segmentation in every] == [-5.0, -6.0, -9.0]


def test_the_longest_match_from_the_left() -> None:
    vocab = dict.fromkeys(("un", "##aff", "##able", "##a"), 0)
    matches = word_piece_matches("unaffable", vocab, "##", 100)
    assert [match.piece for match in matches] == ["un", "##aff", "##able"]
    assert matches[1].tried == ("##affable", "##affabl", "##affab", "##affa", "##aff")
    assert word_piece_matches("unx", vocab, "##", 100)[-1].piece is None


def test_a_drawing() -> None:
    assert draw(explainer("gpt2/tokenizer.json")("lowest é"), byte_level=True) == [
        "BPE: 8 characters, 2 words, 3 tokens",
        "cut:  lowest | ␣é",
        "",
        "1. lowest",
        "                       l o w e s t",
        "     merge 18  e + s   l o w es t",
        "     merge 66  o + w   l ow es t",
        "    merge 139  es + t  l ow est",
        "   merge 9063  l + ow  low est",
        "   ids: 9319 395",
        "",
        "2. ␣é",
        "                             ␣ <C3> <A9>",
        "    merge 2378  <C3> + <A9>  ␣ é",
        "   merge 37995  ␣ + é        ␣é",
        "   ids: 38251",
        "",
        "ids: 9319 395 38251",
    ]


def test_drawings_of_the_other_algorithms() -> None:
    lines = "\n".join(draw(explainer("ggml-vocab-bert-bge.gguf")("unaffable ☃"), byte_level=False))
    assert "unaffable  →  una   (7 candidates tried)" in lines
    assert "so the whole word becomes [UNK]" in lines
    lines = "\n".join(draw(explainer("sentencepiece-unigram-1000.model")("Hello teacher"), byte_level=False))
    assert "best:      ␣He ll o ␣teacher" in lines
    assert "runner-up: ␣He l l o ␣teacher" in lines
    assert "68.5 times less probable" in lines


def test_what_does_not_print_is_written_in_hexadecimal() -> None:
    assert visible("Ġa", byte_level=True) == "␣a"
    assert visible("Ãaĥ", byte_level=True) == "<C3>a<83>"
    assert visible("\x1b[31m", byte_level=False) == "<1B>[31m"
    drawn = "\n".join(draw(explainer("bpe")("\x1b[31m\x00\n"), byte_level=True))
    assert not any(ord(char) < 32 and char != "\n" for char in drawn)


@pytest.mark.parametrize(("text", "sentence"), [("x" * 2001, "2001 characters"), ("\ud800", "lone surrogate")])
def test_what_cannot_be_explained_is_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        explainer("bpe")(text)


@pytest.mark.parametrize("name", OURS)
def test_no_text_has_no_steps(name: str) -> None:
    assert explainer(name)("").ids == []
    assert draw(explainer(name)(""), byte_level=True)[-1] == "ids: "
