"""`weft tokenizer` from the command line: results, `--json`, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizer_cases import nasty_strings, sample_text, trained
from typer.testing import CliRunner

from weft.cli.tokenizer import app
from weft.errors import UserError
from weft.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    trained("bpe").save(folder)
    return folder


def weft(*arguments: str, stdin: str | bytes | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=True)


def result(*arguments: str, stdin: str | bytes | None = None) -> dict:
    done = weft(*arguments, "--json", stdin=stdin)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def refused(*arguments: str, stdin: str | bytes | None = None) -> str:
    done = weft(*arguments, stdin=stdin)
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


def test_encode_and_decode(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    for text in ("Hello world", "¿Qué? 🙂", "a\n\tb  c"):
        found = result("encode", str(model), text)
        assert found["ids"] == tokenizer.encode(text)
        assert found["tokens"] == [tokenizer.token(index) for index in found["ids"]]
        assert result("decode", str(model), *map(str, found["ids"])) == {"text": text}
        assert result("decode", str(model), "-", stdin=json.dumps(found["ids"])) == {"text": text}
        assert weft("encode", str(model), text).stdout.split() == [str(index) for index in found["ids"]]


def test_standard_input(model: Path) -> None:
    for text in nasty_strings()[1:40]:
        expected = load_tokenizer(model).encode(text, special=True)
        assert result("encode", str(model), "-", stdin=text.encode())["ids"] == expected
        assert result("encode", str(model), stdin=text.encode())["ids"] == expected


def test_special_tokens_and_bos(model: Path) -> None:
    assert result("encode", str(model), "<|endoftext|>")["ids"] == [0]
    assert len(result("encode", str(model), "<|endoftext|>", "--no-special")["ids"]) > 1
    assert result("decode", str(model), "0", "--special") == {"text": "<|endoftext|>"}
    assert result("decode", str(model), "0") == {"text": ""}
    assert "no" in refused("encode", str(model), "hi", "--bos")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_train(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text.txt").write_text(sample_text())
    (tmp_path / "more.jsonl").write_text('{"text": "some more words"}\n')
    out = tmp_path / "out"
    found = result("train", str(tmp_path / "text.txt"), str(tmp_path / "more.jsonl"), "--kind", kind, "--vocab-size", "600", "-o", str(out))
    assert found["vocab_size"] == 600
    assert found["text_bytes"] == len(sample_text().encode()) + len("some more words")
    assert found["sampled"] is False
    assert load_tokenizer(out).vocab_size == 600


def test_train_says_that_it_samples(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(sample_text()[number * 6000 : (number + 1) * 6000])
    done = weft("train", str(tmp_path), "--vocab-size", "300", "-o", str(tmp_path / "out"), "--sample-bytes", "20000", "--json")
    assert "an even sample of 20.0 kB" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sampled"] is True
    assert 10_000 < found["text_bytes"] <= 20_000


def test_a_small_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello hello")
    done = weft("train", str(tmp_path / "text.txt"), "--vocab-size", "9000", "-o", str(tmp_path / "out"))
    assert "no more pieces" in done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")


def test_bad_training_input_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"fine\nnot \xff fine\n")
    (tmp_path / "text.txt").write_text("some text")
    for name, size, options, sentence in (
        ("empty.txt", 300, (), "no text"),
        ("bad.txt", 300, (), "bad.txt:2"),
        ("missing.txt", 300, (), "no file"),
        ("text.txt", 100, (), "too small"),
        ("text.txt", 300, ("--kind", "bep"), "Did you mean 'bpe'"),
        ("text.txt", 300, ("--split", "gpt3"), "gpt2"),
        ("text.txt", 300, ("--sample-bytes", "0"), "1 or more"),
    ):
        assert sentence in refused("train", str(tmp_path / name), "--vocab-size", str(size), "-o", str(out), *options)
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("decode", "{model}", "12", "x"), "'x' is no id"),
        (("decode", "{model}", "99999"), "there is no token 99999"),
        (("encode", "{model}/missing.json", "x"), "no tokenizer at"),
        (("encode", "{model}", "\udcff"), "lone surrogate"),
    ],
)
def test_bad_input_is_a_sentence(model: Path, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(*(argument.format(model=model) for argument in arguments))


def test_standard_input_that_is_not_utf8(model: Path) -> None:
    assert "not UTF-8" in refused("encode", str(model), "-", stdin=b"\xff\xfe")


def test_explain(model: Path) -> None:
    found = result("explain", "the self", "--tokenizer", str(model))
    assert found["ids"] == load_tokenizer(model).encode("the self")
    assert found["kind"] == "BPE"
    assert found["words"][0]["start"] == ["t", "h", "e"]
    assert found["words"][0]["merges"][-1]["symbols"] == found["words"][0]["tokens"]
    lines = weft("explain", "the self", "-t", str(model)).stdout
    assert "merge" in lines
    assert "␣ s e l f" in lines


def test_explain_without_a_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_HOME", str(tmp_path))
    assert "weft pull smollm2-135m" in refused("explain", "hi")


def test_the_command_exits_with_two_and_one_line(model: Path) -> None:
    command = [sys.executable, "-m", "weft.cli.main", "tokenizer"]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    good = subprocess.run([*command, "encode", str(model), "hi", "--json"], capture_output=True, check=False, env=environment)
    assert good.returncode == 0
    assert set(json.loads(good.stdout)) == {"ids", "tokens"}
    bad = subprocess.run([*command, "encode", str(model), b"\xff"], capture_output=True, check=False, env=environment)
    assert bad.returncode == 2
    assert bad.stdout == b""
    assert bad.stderr.startswith(b"weft: the text has a lone surrogate")
    assert bad.stderr.count(b"\n") == 1
