"""Training: the same every time, of the size asked for, and sentences for what cannot be trained on."""

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tokenizer_cases import nasty_strings, sample_text, trained

from weft.errors import UserError
from weft.tokenizer.splits import CL100K, GPT2, QWEN2, training_pattern
from weft.tokenizer.train import KINDS, Read, bytes_per_token, evenly, train_tokenizer


def chunks(size: int = 1000) -> Iterator[str]:
    text = sample_text()
    return (text[start : start + size] for start in range(0, len(text), size))


@pytest.mark.parametrize("kind", KINDS)
def test_size_special_tokens_and_round_trip(kind: str) -> None:
    tokenizer = trained(kind)
    assert tokenizer.vocab_size == 700
    assert sorted(tokenizer.special_ids) == list(range(len(tokenizer.special_ids)))
    text = sample_text()[:5000]
    if kind != "wordpiece":
        for sample in [text, *nasty_strings()]:
            if kind == "bpe" or "▁" not in sample:
                assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert bytes_per_token(tokenizer, text) > 2.0


def test_a_larger_vocabulary_needs_fewer_tokens() -> None:
    text = sample_text()[:5000]
    assert bytes_per_token(trained("bpe", 1200), text) > bytes_per_token(trained("bpe"), text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_vocabulary_in_every_process(kind: str) -> None:
    code = (
        "import hashlib, sys; from weft.tokenizer.train import train_tokenizer; "
        f"tokenizer = train_tokenizer({kind!r}, [sys.stdin.read()], 700); "
        "print(hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], input=sample_text(), capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(trained(kind).backend.to_str().encode()).hexdigest()


def test_word_pieces_are_spelled_as_berts() -> None:
    tokenizer = train_tokenizer("wordpiece", ["low lower lowest newer newest wider widest"] * 50, 60, lowercase=True)
    ids = tokenizer.encode("LOWEST wider")
    assert tokenizer.decode(ids) == "lowest wider"
    assert ids[0] == tokenizer.token_id("[CLS]")
    assert ids[-1] == tokenizer.token_id("[SEP]")
    pieces = [tokenizer.token(index) for index in range(tokenizer.vocab_size)]
    assert "##e" in pieces
    assert "lowest" in pieces
    assert not [piece for piece in pieces if ord(max(piece)) >= 0xF0000]
    assert tokenizer.encode("zebra漢", bos=False).count(tokenizer.unk_id) >= 1


def test_bpe_learns_the_textbook_merges() -> None:
    """Sennrich et al. 2016, figure 1: low, lower, newest, widest with counts 5, 2, 6, 3."""
    text = "low " * 5 + "lower " * 2 + "newest " * 6 + "widest " * 3
    tokenizer = train_tokenizer("bpe", [text], 256 + 1 + 6)
    learned = [tokenizer.token(index) for index in range(257, tokenizer.vocab_size)]
    assert learned[:3] == ["es", "est", "lo"]
    assert "low" in learned


@pytest.mark.parametrize(
    ("split", "digits", "pieces"), [("llama3", None, 2), ("qwen2", None, 5), ("llama3", 1, 5), ("gpt2", 0, 1), ("llama3", 0, 1)]
)
def test_digits(split: str, digits: int | None, pieces: int) -> None:
    tokenizer = train_tokenizer("bpe", ["12345 " * 100], 400, split=split, digits=digits)
    assert len(tokenizer.encode("12345")) == pieces


def test_patterns_without_a_digit_option_are_the_published_ones() -> None:
    assert (training_pattern("gpt2"), training_pattern("llama3"), training_pattern("qwen2")) == (GPT2, CL100K, QWEN2)
    assert training_pattern("llama3", 1).replace(r"\p{N}{1,1}", r"\p{N}") == QWEN2


def test_texts_are_streamed_and_reading_stops_at_the_sample() -> None:
    given = 0

    def texts() -> Iterator[str]:
        nonlocal given
        for text in chunks():
            given += 1
            yield text

    read = Read()
    train_tokenizer("bpe", texts(), 300, sample_bytes=10_500, read=read)
    assert (read.num_bytes, read.texts, read.stopped) == (10_500, 11, True)
    assert given == 11
    whole = Read()
    train_tokenizer("bpe", chunks(), 300, read=whole)
    assert whole.num_bytes == len(sample_text().encode())
    assert not whole.stopped


def test_a_sample_never_cuts_a_character() -> None:
    read = Read()
    train_tokenizer("bpe", ["é" * 100], 300, sample_bytes=101, read=read)
    assert read.num_bytes == 100


def test_an_even_sample_comes_from_everywhere() -> None:
    taken = [int(text) for text in evenly((f"{number:04}" for number in range(1000)), 0.1)]
    assert len(taken) == pytest.approx(100, abs=1)
    assert max(second - first for first, second in itertools.pairwise(taken)) <= 11
    assert list(evenly(["a", "b"], 1.0)) == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "texts", "size", "options", "sentence"),
    [
        ("bpe", ["text"], 256, {}, "256 bytes and 1 special token need 257"),
        ("bpe", ["text"], 10, {}, "too small"),
        ("unigram", ["text"], 300, {}, "too small"),
        ("wordpiece", ["text"], 5, {}, "too small"),
        ("bpe", [], 300, {}, "no text"),
        ("bpe", [""], 300, {}, "no text"),
        ("wordpiece", [], 300, {}, "no text"),
        ("unigram", [], 500, {}, "no text"),
        ("bpf", ["text"], 300, {}, "Did you mean 'bpe'"),
        ("bpe", ["text"], 300, {"split": "lama3"}, "Did you mean 'llama3'"),
        ("bpe", ["text"], 300, {"digits": -1}, "digits is -1"),
        ("bpe", ["text"], 300, {"min_frequency": 0}, "min_frequency 0"),
        ("bpe", ["text"], 300, {"sample_bytes": 0}, "sample is 0"),
        ("bpe", ["text"], 300, {"special_tokens": ["<a>", "<a>"]}, "each once"),
    ],
)
def test_bad_input_is_a_sentence(kind: str, texts: list[str], size: int, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train_tokenizer(kind, texts, size, **options)


def test_a_small_text_gives_a_small_vocabulary() -> None:
    tokenizer = train_tokenizer("bpe", ["hello hello"], 5000)
    assert 257 < tokenizer.vocab_size < 270


def test_required_tokens_are_added() -> None:
    tokenizer = train_tokenizer("unigram", [sample_text()[:20_000]], 500, ["<sep>"])
    assert [tokenizer.token(index) for index in range(2)] == ["<unk>", "<sep>"]
    tokenizer = train_tokenizer("wordpiece", ["some text"] * 9, 60, ["[CLS]", "[SEP]"])
    assert tokenizer.unk_id == 0
    assert tokenizer.settings.prefix == (1,)
