"""`weft data` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import byte_level_bpe

from weft.cli.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a tokenizer `tok.json` and a text `a.txt`."""
    monkeypatch.chdir(tmp_path)
    byte_level_bpe().save(str(tmp_path / "tok.json"))
    (tmp_path / "a.txt").write_text("".join(f"the cat sat on mat {n}\n" for n in range(2000)))
    return tmp_path


def weft(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weft", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_prepare_and_show(folder, monkeypatch, capsys) -> None:
    assert weft(monkeypatch, "data", "prepare", "a.txt", "--tokenizer", "tok.json", "-o", "out", "--valid", "0.1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "out: train" in lines[0]
    assert weft(monkeypatch, "data", "show", "out", "--length", "20", "--verify") == 0
    shown = capsys.readouterr()
    assert "bytes/token" in shown.out
    assert "── document 0, columns 0 to 19 ──\nthe cat sat on mat 0\n" in shown.out
    assert "as they were written" in shown.err


def test_json_is_the_last_line(folder, monkeypatch, capsys) -> None:
    (folder / "pairs.jsonl").write_text('{"prompt": "the cat", "completion": " sat"}\n{"text": ""}\n' * 30)
    common = ["data", "prepare", "pairs.jsonl", "-t", "tok.json", "-o", "out", "--json"]
    assert weft(monkeypatch, *common) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["empty"] == 30
    assert not made["reused"]
    assert made["splits"]["train"]["documents"] + made["splits"]["valid"]["documents"] == 30
    assert made["sources"][0]["path"] == "pairs.jsonl"
    assert weft(monkeypatch, *common) == 0
    assert json.loads(capsys.readouterr().out)["reused"]
    assert weft(monkeypatch, "data", "show", "out", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(passage["trained"], passage["text"]) for passage in shown["sample"][0]] == [(False, "the cat"), (True, " sat")]


BAD = [
    (["prepare", "none.txt", "-t", "tok.json", "-o", "out"], "there is no file or folder none.txt"),
    (["prepare", "empty.txt", "-t", "tok.json", "-o", "out"], "the corpus is empty: there is no text in empty.txt"),
    (["prepare", "latin.txt", "-t", "tok.json", "-o", "out"], "latin.txt:1: the byte 0xe9 at column 4 is not UTF-8"),
    (["prepare", "bad.jsonl", "-t", "tok.json", "-o", "out"], "bad.jsonl:1: there is no field 'text' in the record (it has body)"),
    (["prepare", "a.txt", "-t", "tok.json", "-o", "out", "--valid", "1.5"], "it must be at least 0 and below 1"),
    (["prepare", "a.txt", "-t", "tok.json", "-o", "out", "--holdout", "tial"], "Did you mean 'tail'"),
    (["prepare", "a.txt", "-t", "tok.json", "-o", "."], "not prepared data, so it is left alone"),
    (["prepare", "a.txt", "-t", "tok.json", "-o", "out", "--field", "text"], "no file is JSONL or Parquet"),
    (["prepare", "bad.jsonl", "-t", "tok.json", "-o", "out", "--separator", "--"], "no file is plain text"),
    (["show", "none"], "there is no folder none"),
    (["show", "."], "is not prepared data"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_sentence(folder, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "bad.jsonl").write_text('{"body": "x"}\n')
    before = sorted(folder.rglob("*"))
    assert weft(monkeypatch, "data", *arguments) == 2
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if line.strip()]
    assert len(told) == 1
    assert told[0].startswith("weft: ")
    assert message in told[0]
    assert captured.out == ""
    assert sorted(folder.rglob("*")) == before


def test_a_shard_cut_short_is_one_sentence(folder, monkeypatch, capsys) -> None:
    weft(monkeypatch, "data", "prepare", "a.txt", "-t", "tok.json", "-o", "out")
    capsys.readouterr()
    path = folder / "out" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:100])
    assert weft(monkeypatch, "data", "show", "out") == 2
    assert "cut short" in capsys.readouterr().err


def test_preparing_needs_no_torch(folder) -> None:
    program = (
        "import sys; from weft.cli.main import main; sys.argv = sys.argv[:1] + {}\ntry: main()\nfinally: print('torch' in sys.modules)"
    )
    for arguments in (["data", "prepare", "a.txt", "-t", "tok.json", "-o", "out"], ["data", "show", "out"]):
        done = subprocess.run([sys.executable, "-c", program.format(arguments)], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False", done.stdout
