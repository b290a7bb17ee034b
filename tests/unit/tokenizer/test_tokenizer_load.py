"""Every way a tokenizer comes on disk, and a sentence for every way it can be wrong."""

import base64
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizer_cases import data, loaded, metadata, nasty_strings, sample_text, trained

from weft.errors import UserError
from weft.tokenizer import load_tokenizer, tokenizer_from_gguf
from weft.tokenizer.token_text import BYTE_TO_CHAR, CHAR_TO_BYTE, bytes_to_symbols, symbols_to_bytes
from weft.tokenizer.train import train_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained("bpe").save(tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def test_folder_and_file_are_the_same(folder: Path) -> None:
    texts = nasty_strings()[:200]
    assert load_tokenizer(folder).encode_batch(texts) == load_tokenizer(str(folder / "tokenizer.json")).encode_batch(texts)


def test_truncation_and_padding_in_the_file_are_not_used(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {
        "strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer, text = load_tokenizer(folder), sample_text()[:500]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


def test_parts_from_the_configuration(folder: Path) -> None:
    roles = {"bos_token": {"content": "<|start|>", "lstrip": False}, "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    edit(folder / "tokenizer_config.json", **roles, add_bos_token=True, additional_special_tokens=["<|im_end|>"])
    edit(folder / "generation_config.json", eos_token_id=[0, 5, 99_999])
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.token(index) for index in (tokenizer.bos_id, tokenizer.pad_id)] == ["<|start|>", "<|pad|>"]
    assert tokenizer.encode("<|start|>hi", special=True)[:2] != [tokenizer.bos_id] * 2
    assert tokenizer.encode("hi")[0] == tokenizer.bos_id
    assert tokenizer.eos_ids == (0, 5)
    assert len(tokenizer.encode("<|im_end|>", special=True, bos=False)) == 1
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "{{ messages[0].content }}<|im_end|>"}])
    again = load_tokenizer(folder)
    assert again.eos_ids == (0, 5, again.token_id("<|im_end|>"))
    assert again.render_chat([{"role": "user", "content": "Hi"}]) == "Hi<|im_end|>"


def test_ids_from_config_json_where_nothing_else_says(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    edit(folder / "config.json", bos_token_id=7, eos_token_id=[3, 4])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id == 7
    assert tokenizer.eos_ids[:2] == (0, 3)


def test_vocab_and_merges(folder: Path, tmp_path: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    plain = train_tokenizer("bpe", [sample_text()], 700, split="gpt2")
    model = json.loads(plain.backend.to_str())["model"]
    other = tmp_path / "two"
    other.mkdir()
    (other / "vocab.json").write_text(json.dumps(model["vocab"]))
    (other / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    tokenizer = load_tokenizer(other)
    assert tokenizer.encode_batch(nasty_strings()) == plain.encode_batch(nasty_strings())
    assert tokenizer.eos_ids == (0,)
    (other / "merges.txt").write_text("a b\nnot one merge\n")
    with pytest.raises(UserError, match="line 2"):
        load_tokenizer(other)
    (other / "merges.txt").write_text("zz qq\n")
    with pytest.raises(UserError, match="does not belong"):
        load_tokenizer(other)
    (other / "merges.txt").unlink()
    with pytest.raises(UserError, match="without its merges"):
        load_tokenizer(other)


def test_gpt1_words_end_with_a_mark(tmp_path: Path) -> None:
    tokens = ["<unk>", *"abcdefghijklmnopqrstuvwxyz.", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz."), "th", "the</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("The cat.")
    assert [tokenizer.token(index) for index in ids] == ["the</w>", "c", "a", "t</w>", ".</w>"]
    assert tokenizer.decode(ids) == "the cat ."
    stream = tokenizer.stream_decoder()
    assert "".join([*map(stream.push, ids), stream.finish()]) == "the cat ."


def test_vocab_txt(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nun\n##aff\n##able\n!\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Unaffable!") == [2, 5, 6, 7, 8, 3]
    assert tokenizer.encode("Unaffable!", bos=False) == [5, 6, 7, 8]
    assert tokenizer.decode(tokenizer.encode("unaffable!")) == "unaffable!"
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).encode("Unaffable", bos=False) == [1]
    (tmp_path / "vocab.txt").write_text("just\nsome\nlines\n")
    with pytest.raises(UserError, match=r"\[UNK\]"):
        load_tokenizer(tmp_path)


def ranks_file(path: Path, count: int = 300) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"12", b"123"]
    tokens += [bytes([index % 256, 255, 254, index // 256 % 256, index // 65536]) for index in range(count - len(tokens))]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def test_a_tiktoken_vocabulary_of_ones_own(tmp_path: Path) -> None:
    path = ranks_file(tmp_path / "own.tiktoken")
    with pytest.raises(UserError, match="regular expression"):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, pattern=r"\p{N}{1,3}|\P{N}+")
    assert tokenizer.encode("a the 123") == [97, 258, 32, 260]
    assert tokenizer.decode([300], skip_special=False) == "<|endoftext|>"
    shutil.copy(path, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path, pattern=r"\p{N}{1,3}|\P{N}+").encode("a the 123") == [97, 258, 32, 260]


@pytest.mark.parametrize("line", [b"!!! 5", b"YQ==", b"YQ== five", b"YQ== 1 2"])
def test_a_bad_line_of_ranks_is_named(tmp_path: Path, line: bytes) -> None:
    path = ranks_file(tmp_path / "own.tiktoken")
    path.write_bytes(b"YQ== 97\n" + line + b"\n")
    with pytest.raises(UserError, match="line 2"):
        load_tokenizer(path, pattern=".")


def test_llama3s_own_file_is_told_from_a_sentencepiece_model(tmp_path: Path) -> None:
    path = ranks_file(tmp_path / "tokenizer.model", count=128_000)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("the") == [128_000, 257]
    assert tokenizer.token(128_009) == "<|eot_id|>"
    assert tokenizer.token(128_001) == "<|end_of_text|>"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (128_256, 128_001)


def test_llama2c() -> None:
    tokenizer = loaded("../models/stories260K/tok512.bin")
    text = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer.json", b"", "is empty"),
        ("vocab.json", b"[]", "not an object"),
        ("vocab.json", b"{", "not valid JSON"),
        ("x.tiktoken", b"", "is empty"),
        ("x.model", b"\x00\x01\x02", "SentencePiece"),
        ("x.bin", b"\x00\x00", "llama2.c"),
        ("x.bin", struct.pack("<ifi", 5, 0.0, 3) + b"abc", "llama2.c"),
        ("x.gguf", b"GGUF", "cut short"),
        ("x.xyz", b"hello", "no tokenizer file"),
    ],
)
def test_a_bad_file_is_a_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_tokenizer(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="has no tokenizer in it"):
        load_tokenizer(tmp_path)


def test_a_pulled_model_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_HOME", str(tmp_path))
    with pytest.raises(UserError, match="weft pull"):
        load_tokenizer("smollm2-135m")


def test_gguf_by_its_metadata() -> None:
    facts = metadata("ggml-vocab-gpt-2.gguf")
    key = "tokenizer.ggml."
    changed = {**facts, key + "add_bos_token": True, key + "add_eos_token": True, "tokenizer.chat_template": "{{ bos_token }}"}
    tokenizer = tokenizer_from_gguf(changed)
    assert tokenizer.encode("hi")[0] == tokenizer.encode("hi")[-1] == 50256
    assert tokenizer.render_chat([{"role": "user", "content": ""}]) == "<|endoftext|>"
    assert tokenizer_from_gguf({**facts, key + "pre": "llama-bpe"}).encode("hi")[0] == 50256
    for name, value, sentence in (
        ("pre", "gpt-3", "Did you mean"),
        ("model", "rwkv", "kind of tokenizer"),
        ("model", None, "kind of tokenizer"),
        ("tokens", None, "no tokenizer"),
        ("merges", None, "without merges"),
        ("merges", ["zz zzqq"], "do not belong"),
        ("token_type", [1, 1], "entries"),
    ):
        with pytest.raises(UserError, match=sentence):
            tokenizer_from_gguf({**facts, key + name: value})


def test_gguf_without_a_cut_says_so(caplog: pytest.LogCaptureFixture) -> None:
    facts = {name: value for name, value in metadata("ggml-vocab-gpt-2.gguf").items() if name != "tokenizer.ggml.pre"}
    assert tokenizer_from_gguf(facts).encode("it's 12345") == loaded("ggml-vocab-gpt-2.gguf").encode("it's 12345")
    assert not caplog.records
    tokenizer_from_gguf({**facts, "general.architecture": "llama"})
    assert "does not say how its text is cut" in caplog.text


def test_gguf_tokens_that_stand_twice_keep_their_ids() -> None:
    facts = metadata("ggml-vocab-gpt-2.gguf")
    tokens = list(facts["tokenizer.ggml.tokens"])
    tokens[100], tokens[101] = tokens[5], ""
    with pytest.raises(UserError, match="do not belong"):
        tokenizer_from_gguf({**facts, "tokenizer.ggml.tokens": tokens})
    extra = {**facts, "tokenizer.ggml.tokens": [*facts["tokenizer.ggml.tokens"], "", "!"]}
    extra["tokenizer.ggml.token_type"] = [*facts["tokenizer.ggml.token_type"], 5, 1]
    tokenizer = tokenizer_from_gguf(extra)
    assert tokenizer.vocab_size == 50259
    assert tokenizer.encode("!") == [50258]


def test_gguf_unigram() -> None:
    """T5's kind, made of the published Unigram model, gives the ids of that model."""
    from weft.tokenizer.sentencepiece import read_model

    model = read_model(data("sentencepiece-unigram-1000.model"))
    key = "tokenizer.ggml."
    facts = {
        key + "model": "t5",
        key + "tokens": [piece.text for piece in model.pieces],
        key + "scores": [piece.score for piece in model.pieces],
        key + "token_type": [piece.kind for piece in model.pieces],
        key + "precompiled_charsmap": list(model.charsmap),
        key + "remove_extra_whitespaces": True,
        key + "unknown_token_id": 0,
        key + "eos_token_id": 2,
    }
    tokenizer, original = tokenizer_from_gguf(facts), loaded("sentencepiece-unigram-1000.model")
    assert tokenizer.encode_batch(nasty_strings()) == original.encode_batch(nasty_strings())
    assert tokenizer.encode("hi")[-1] == 2


def test_the_byte_alphabet() -> None:
    assert len(set(BYTE_TO_CHAR.values())) == 256
    assert all(CHAR_TO_BYTE[char] == byte for byte, char in BYTE_TO_CHAR.items())
    assert bytes_to_symbols(b" \n\x00A\xff") == "ĠĊĀAÿ"
    assert symbols_to_bytes("ĠĊĀAÿ") == b" \n\x00A\xff"
    assert symbols_to_bytes("漢") is None
