"""Ids equal those of the reference implementations: the published vectors, tiktoken, and the tokenizers library."""

import base64
import time

import pytest
import tokenizers
from tokenizer_cases import VECTORS, data, loaded, metadata, metadata_by_gguf_package, nasty_strings, reference_vectors, sample_text

from weft.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from weft.tokenizer.splits import CL100K, GGUF_SPLITS, GPT2, O200K, QWEN2


@pytest.mark.parametrize("name", VECTORS)
def test_gguf_vectors(name: str) -> None:
    path = data(f"ggml-vocab-{name}.gguf")
    tokenizer = loaded(path.name)
    vectors = reference_vectors(path)
    assert len(vectors) >= 46
    for text, ids in vectors:
        assert tokenizer.encode(text, bos=False) == ids, repr(text)


def test_gguf_metadata_of_another_reader_gives_the_same() -> None:
    pytest.importorskip("gguf")
    path = data("ggml-vocab-bert-bge.gguf")
    other, ours = tokenizer_from_gguf(metadata_by_gguf_package(path)), loaded(path.name)
    assert other.settings == ours.settings
    for text in nasty_strings()[::10]:
        assert other.encode(text, special=True) == ours.encode(text, special=True)


def _with_pre(name: str, pre: str) -> Tokenizer:
    """A vocabulary of a GGUF file as if the file named another way to cut text."""
    return tokenizer_from_gguf({**metadata(name), "tokenizer.ggml.pre": pre})


def test_a_wrong_pre_tokenizer_is_seen() -> None:
    """Negative control: the vectors tell apart what only the cuts differ in."""
    name = "ggml-vocab-deepseek-coder.gguf"
    wrong = _with_pre(name, "gpt-2")
    assert any(wrong.encode(text, bos=False) != ids for text, ids in reference_vectors(data(name)))


def _tiktoken(name: str, pattern: str):
    tiktoken = pytest.importorskip("tiktoken")
    lines = (line.split() for line in data(name).read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# Patterns as tiktoken publishes them: possessive forms of ours.
TIKTOKEN = {
    "gpt2.tiktoken": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base.tiktoken": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
}


@pytest.mark.parametrize("name", TIKTOKEN)
def test_tiktoken_on_nasty_strings(name: str) -> None:
    reference, tokenizer = _tiktoken(name, TIKTOKEN[name]), loaded(name)
    texts = [*nasty_strings(), "a" * 100_000, "ab " * 20_000, sample_text()]
    expected = reference.encode_ordinary_batch(texts)
    assert tokenizer.encode_batch(texts) == expected
    for text, ids in zip(texts[:100], expected, strict=False):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text == reference.decode(ids)


def test_tiktoken_with_another_pattern_differs() -> None:
    """Negative control."""
    wrong = load_tokenizer(data("gpt2.tiktoken"), pattern=CL100K)
    reference = _tiktoken("gpt2.tiktoken", TIKTOKEN["gpt2.tiktoken"])
    assert sum(wrong.encode(text) != reference.encode_ordinary(text) for text in nasty_strings()) > 30


@pytest.mark.parametrize("name", ["gpt2/gpt2_vocab.json", "gpt2.tiktoken", "ggml-vocab-gpt-2.gguf", "gpt2/tokenizer.json"])
def test_gpt2_in_four_formats(name: str) -> None:
    plain = tokenizers.Tokenizer.from_file(str(data("gpt2/tokenizer.json")))
    plain.encode_special_tokens = True
    texts = nasty_strings()
    expected = [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)]
    assert loaded(name).encode_batch(texts) == expected
    assert loaded(name).decode([50256], skip_special=False) == "<|endoftext|>"
    assert loaded(name).eos_ids == (50256,)


@pytest.mark.parametrize("name", ["gpt2/tokenizer.json", "ggml-vocab-phi-3.gguf", "ggml-vocab-deepseek-coder.gguf", "gpt2.tiktoken"])
def test_one_letter_takes_linear_time(name: str) -> None:
    """Eight times the text in well under 64 times the time, which quadratic merging would need."""
    tokenizer = loaded(name)

    def seconds(length: int) -> float:
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            tokenizer.encode("a" * length)
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(200_000) < 24 * seconds(25_000)


@pytest.mark.parametrize("name", ["gpt2/tokenizer.json", "ggml-vocab-deepseek-coder.gguf", "cl100k_base.tiktoken"])
def test_byte_level_vocabularies_lose_nothing(name: str) -> None:
    tokenizer = loaded(name)
    for text in nasty_strings():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", [GPT2, CL100K, QWEN2, O200K, *(part for split in GGUF_SPLITS.values() for part in split.patterns)])
def test_every_pattern_compiles_and_keeps_all_text(pattern: str) -> None:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for text in nasty_strings()[:60]:
        assert "".join(piece for piece, _ in split.pre_tokenize_str(text)) == text


def test_o200k_pattern_as_published() -> None:
    public = pytest.importorskip("tiktoken_ext.openai_public")
    source = "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    )
    assert source == O200K
    assert public.r50k_pat_str == TIKTOKEN["gpt2.tiktoken"]


def test_digits_stay_together_as_the_name_says() -> None:
    counts = {pre: len(_with_pre("ggml-vocab-gpt-2.gguf", pre).encode("12345")) for pre in ("gpt-2", "smollm", "starcoder", "qwen2")}
    assert counts == {"gpt-2": 2, "smollm": 5, "starcoder": 5, "qwen2": 5}
