"""BOS, special tokens, decoding, streaming and saving."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import loaded, nasty_strings, sample_text, trained

from weft.errors import UserError
from weft.tokenizer import Settings, Tokenizer, load_tokenizer
from weft.tokenizer.huggingface import set_frame
from weft.tokenizer.train import train_tokenizer

OURS = ("bpe", "wordpiece", "unigram")
PACK = (
    "gpt2/tokenizer.json",
    "ggml-vocab-gpt-2.gguf",
    "ggml-vocab-phi-3.gguf",
    "ggml-vocab-deepseek-coder.gguf",
    "ggml-vocab-bert-bge.gguf",
    "gpt2.tiktoken",
    "sentencepiece-unigram-1000.model",
    "../models/stories260K/tok512.bin",
)


def with_bos() -> Tokenizer:
    """A byte-level BPE whose settings put a BOS before every text."""
    tokenizer = train_tokenizer("bpe", [sample_text()], 400, ["<|bos|>", "<|endoftext|>", "<|im_end|>"])
    roles = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>"}
    set_frame(tokenizer.backend, (0,), ())
    return Tokenizer(tokenizer.backend, Settings(roles, prefix=(0,)))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("text", ["", "hi", "<|bos|>", "<|bos|>hi", "<|bos|><|bos|>hi", " <|bos|>hi"])
def test_bos_is_never_doubled(text: str, bos: bool | None, special: bool) -> None:
    tokenizer = with_bos()
    ids = tokenizer.encode(text, special=special, bos=bos)
    spelled = text.count("<|bos|>") if special else 0
    begins = special and text.startswith("<|bos|>")
    assert ids.count(0) == spelled + (0 if begins or bos is False else 1)
    assert (ids[:1] == [0]) == (begins or bos is not False)


def test_bos_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="BOS"):
        trained("bpe").encode("hi", bos=True)


def test_batches_add_nothing_unless_asked() -> None:
    tokenizer = with_bos()
    texts = ["hi", "<|bos|>hi", ""]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text, bos=False) for text in texts]
    assert tokenizer.encode_batch(texts, special=True, bos=None) == [tokenizer.encode(text, special=True) for text in texts]


@pytest.mark.parametrize("kind", OURS)
def test_special_tokens_are_text_unless_asked_for(kind: str) -> None:
    tokenizer = trained(kind)
    for name, index in tokenizer._special.items():
        plain, read = tokenizer.encode(f"a{name}b", bos=False), tokenizer.encode(f"a{name}b", special=True, bos=False)
        unknown = tokenizer.unk_id
        assert index in read
        assert index not in plain or index == unknown
        assert tokenizer.token_bytes(index) == b""


def test_a_unigram_search_never_finds_a_special_token() -> None:
    """The library's own search does: the negative control."""
    tokenizer = trained("unigram")
    library = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    library.encode_special_tokens = True
    assert 2 in library.encode("x</s>y", add_special_tokens=False).ids
    assert not tokenizer.special_ids & set(tokenizer.encode("x</s>y<unk><s>", bos=False))
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00"])
def test_lone_surrogates_are_refused_with_a_sentence(text: str) -> None:
    for tokenizer in map(trained, OURS):
        for encode in (tokenizer.encode, lambda text, own=tokenizer: own.encode_batch(["fine", text])):
            with pytest.raises(UserError, match="lone surrogate, U\\+D"):
                encode(text)
    with pytest.raises(UserError, match="lone surrogate"):
        train_tokenizer("bpe", [text], 300)


@pytest.mark.parametrize("name", PACK)
def test_streaming_gives_what_decoding_gives(name: str) -> None:
    tokenizer = loaded(name)
    for text in nasty_strings()[::3]:
        for skip in (True, False):
            ids = tokenizer.encode(text, special=True)
            stream = tokenizer.stream_decoder(skip)
            parts = [stream.push(index) for index in ids]
            assert "".join([*parts, stream.finish()]) == tokenizer.decode(ids, skip_special=skip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 699), max_size=30), st.sampled_from(OURS), st.booleans())
def test_streaming_any_ids(ids: list[int], kind: str, skip: bool) -> None:
    tokenizer = trained(kind)
    stream = tokenizer.stream_decoder(skip)
    parts = [stream.push(index) for index in ids]
    assert "".join([*parts, stream.finish()]) == tokenizer.decode(ids, skip_special=skip)


def test_streaming_never_shows_half_a_character() -> None:
    tokenizer = trained("bpe")
    ids = tokenizer.encode("🙂é")
    assert len(ids) == 6
    stream = tokenizer.stream_decoder()
    assert [stream.push(index) for index in ids] == ["", "", "", "🙂", "", "é"]
    cut = tokenizer.stream_decoder()
    assert [cut.push(index) for index in ids[:2]] == ["", ""]
    assert cut.finish() == "\ufffd"
    # Negative control: token by token, the character falls apart.
    assert "🙂" not in "".join(tokenizer.decode([index]) for index in ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_token_bytes_put_together_are_the_text(kind: str) -> None:
    tokenizer = trained(kind)
    for text in nasty_strings()[::7]:
        data = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, bos=False)))
        expected = text.encode() if kind == "bpe" else (" " + text).encode() if text else b""
        assert data == expected.replace("▁".encode(), b" " if kind == "unigram" else "▁".encode())


def test_ids_without_a_token_decode_to_nothing() -> None:
    for tokenizer in map(trained, OURS):
        assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
        assert tokenizer.token(tokenizer.vocab_size) is None
        assert tokenizer.token(-1) is None
        assert tokenizer.token_bytes(-1) == b""


def test_ends_of_generation() -> None:
    phi3 = loaded("ggml-vocab-phi-3.gguf")
    assert phi3.eos_ids == (32000, 32007)
    assert [phi3.token(index) for index in phi3.eos_ids] == ["<|endoftext|>", "<|end|>"]
    assert loaded("ggml-vocab-deepseek-coder.gguf").eos_ids == (32014,)


def test_pickled_tokenizers_keep_their_rules() -> None:
    tokenizer = with_bos()
    tokenizer.encode("<|bos|>")
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 (our own bytes)
    for special in (True, False):
        assert copy.encode("x<|bos|>y", special=special) == tokenizer.encode("x<|bos|>y", special=special)


TEXTS = nasty_strings()[:400]


def _same(one: Tokenizer, other: Tokenizer, texts: list[str] = TEXTS) -> None:
    for special in (True, False):
        assert one.encode_batch(texts, special=special, bos=None) == other.encode_batch(texts, special=special, bos=None)
    facts = ("vocab_size", "bos_id", "eos_id", "eos_ids", "unk_id", "pad_id", "special_ids", "chat_template")
    assert {fact: getattr(one, fact) for fact in facts} == {fact: getattr(other, fact) for fact in facts}
    assert one.settings.prefix == other.settings.prefix
    assert one.settings.suffix == other.settings.suffix


def _check_saved(tokenizer: Tokenizer, folder: Path, family: str | None, texts: list[str] = TEXTS) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    if family:
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
    _same(load_tokenizer(folder), tokenizer, texts)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert [theirs.encode(text) for text in texts] == [tokenizer.encode(text, special=True) for text in texts]
    plain = [theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    assert plain == tokenizer.encode_batch(texts)
    for text in texts[::5]:
        ids = tokenizer.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize(("kind", "family"), [("bpe", "llama"), ("bpe", "gpt2"), ("wordpiece", None), ("unigram", "mistral")])
def test_transformers_reads_what_is_saved(kind: str, family: str | None, tmp_path: Path) -> None:
    # In transformers a Unigram search finds a special token that is spelled in a text; that difference has its own test.
    texts = [text for text in TEXTS if kind != "unigram" or not any(name in text for name in ("<s>", "</s>", "<unk>"))]
    _check_saved(trained(kind), tmp_path / "saved", family, texts)


def test_transformers_reads_a_saved_bos(tmp_path: Path) -> None:
    _check_saved(with_bos(), tmp_path / "saved", "llama")


@pytest.mark.parametrize("name", ["ggml-vocab-gpt-2.gguf", "ggml-vocab-phi-3.gguf", "ggml-vocab-bert-bge.gguf", "gpt2.tiktoken"])
def test_transformers_reads_converted_vocabularies(name: str, tmp_path: Path) -> None:
    # A text that begins with <s> gets a second one in transformers, and none here.
    texts = [text for text in TEXTS[::2] if not text.startswith("<s>")]
    _check_saved(loaded(name), tmp_path / "saved", "llama", texts)


def test_saving_replaces_a_template_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    plain = trained("bpe")
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}", "../evil": "x"}
    Tokenizer(plain.backend, Settings(plain.settings.roles, chat_templates=templates)).save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.settings.chat_templates == {name: templates[name] for name in ("default", "tool_use")}
    assert not (tmp_path.parent / "evil.jinja").exists()
    plain.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_here_imports_torch() -> None:
    code = "import sys, weft.tokenizer, weft.tokenizer.train, weft.tokenizer.explain, weft.cli.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
