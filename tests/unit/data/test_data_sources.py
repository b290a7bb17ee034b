"""Files as documents, and what is said about files that cannot be read."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from data_helpers import byte_level_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from paths import SHARED
from weft.data.documents import Document
from weft.data.sources import Reading, find_files, read_documents
from weft.data.text_files import read_text_documents
from weft.errors import UserError


def read(path: Path, **reading) -> list[Document]:
    return list(read_documents(path, Reading(**reading)))


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document(tmp_path) -> None:
    path = written(tmp_path / "a.txt", "\ufeffone\r\ntwo\n\n")
    assert [document.text for document in read(path)] == ["one\r\ntwo\n\n"]  # the byte-order mark alone is taken away


def test_a_separator_line_divides(tmp_path) -> None:
    path = written(tmp_path / "a.txt", "first\nstory\n<|end|>\nsecond <|end|> story\n<|end|>\n<|end|>\nthird\r\n")
    found = read(path, separator="<|end|>")
    assert [document.text for document in found] == ["first\nstory", "second <|end|> story", "third"]
    assert [document.origin.rsplit(":", 1)[1] for document in found] == ["1", "4", "7"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é日👩\n \t", max_size=400), st.integers(1, 60))
def test_pieces_put_together_are_the_file(tmp_path_factory, text: str, piece: int) -> None:
    path = written(tmp_path_factory.mktemp("t") / "a.txt", text)
    pieces = list(read_text_documents(path, piece_bytes=piece))
    assert "".join(document.text for document in pieces) == text
    assert [document.continues for document in pieces] == [False] + [True] * (len(pieces) - 1)


def test_pieces_have_the_tokens_of_the_whole(tmp_path) -> None:
    backend = byte_level_bpe()
    text = "the cat sat on the mat\n\n    indented text, too\nthen the other\n\n\ncat sat there.\n" * 200
    whole = backend.encode(text).ids
    path = written(tmp_path / "a.txt", text)
    pieces = [document.text for document in read_text_documents(path, piece_bytes=700)]
    assert len(pieces) > 10
    assert [token for piece in pieces for token in backend.encode(piece).ids] == whole
    middle = len(text) // 2 + 1  # a cut anywhere changes them
    cuts = [backend.encode(text[:at]).ids + backend.encode(text[at:]).ids for at in range(middle, middle + 80)]
    assert any(ids != whole for ids in cuts)


def test_pieces_of_real_text_have_the_tokens_of_the_whole() -> None:
    if SHARED is None:
        pytest.skip("needs the data pack")
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizers/gpt2/tokenizer.json"))
    path = SHARED / "text/gutenberg-carroll-alice.txt"
    pieces = [document.text for document in read_text_documents(path, piece_bytes=3000)]
    assert len(pieces) > 40
    assert [token for piece in pieces for token in backend.encode(piece).ids] == backend.encode(path.read_bytes().decode()).ids


def test_jsonl_text_field_and_pairs(tmp_path) -> None:
    lines = ['{"text": "a", "n": 1}', "", '{"prompt": "q", "completion": "r"}', '{"text": "b"}']
    path = written(tmp_path / "a.jsonl", "\n".join(lines))
    found = read(path)
    assert [(document.prompt, document.text) for document in found] == [(None, "a"), ("q", "r"), (None, "b")]
    assert found[1].origin == f"{path}:3"
    other = written(tmp_path / "b.jsonl", '{"text": "a", "body": "c"}\n')
    assert [document.text for document in read(other, field="body")] == ["c"]


def test_gzip_is_read_through(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 3))
    assert len(read(path)) == 3
    cut = written(tmp_path / "b.jsonl.gz", path.read_bytes()[:-12])
    with pytest.raises(UserError, match="cut short"):
        read(cut)


BAD_LINES = [
    ('{"text": "a"', r"a\.jsonl:2: bad JSON at column 13"),
    ('{"text": "a",}', r"a\.jsonl:2: bad JSON at column 1\d"),
    ('["a"]', "the line is a list, not an object.*jq"),
    ("3", "the line is a number, not an object"),
    ('{"texts": "a"}', r"a\.jsonl:2: there is no field 'text' in the record \(it has texts\)\. Did you mean 'texts'"),
    ('{"prompt": "a"}', "there is no field 'completion'"),
    ("{}", "it is empty"),
    ('{"text": null}', "field 'text' is null, not a string"),
    ('{"text": ["a"]}', "field 'text' is a list, not a string"),
    ('{"text": 3.5}', "field 'text' is a number, not a string"),
    ('{"text": "ab\\ud800"}', r"half of a surrogate pair \(\\ud800\) at character 3"),
    ("[" * 100_000, "bad JSON"),
    ('{"text": ' + "9" * 5000 + "}", "bad JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_records_are_named(tmp_path, line: str, message: str) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(path)


def test_text_that_is_not_utf8_is_named_by_row_and_column(tmp_path) -> None:
    path = written(tmp_path / "a.txt", "fine\nalso é".encode() + b"\xff more\n")
    with pytest.raises(UserError, match=r"a\.txt:2: the byte 0xff at column 8 is not UTF-8"):
        read(path)
    with pytest.raises(UserError, match="UTF-16"):
        read(written(tmp_path / "b.txt", "text".encode("utf-16")))
    with pytest.raises(UserError, match=r"c\.jsonl:1: the byte 0xe9 at column 11"):
        read(written(tmp_path / "c.jsonl", '{"text": "é"}'.encode("latin-1")))
    late = written(tmp_path / "d.txt", b"a line\n" * 100 + b"bad \xff\n")
    with pytest.raises(UserError, match=r"d\.txt:101: .* column 5 "):
        list(read_text_documents(late, piece_bytes=50))


def test_parquet(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"row {n}" for n in range(3000)], "n": range(3000)}), path)
    found = read(path)
    assert [document.text for document in found] == [f"row {n}" for n in range(3000)]
    assert found[2999].origin == f"{path}:3000"
    with pytest.raises(UserError, match="column 'n' is of type int64, not string"):
        read(path, field="n")
    with pytest.raises(UserError, match=r"no field 'body'.*it has n, text"):
        read(path, field="body")
    pairs = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["q", "w"], "completion": ["r", None]}), pairs)
    with pytest.raises(UserError, match=r"b\.parquet:2: field 'completion' is null"):
        read(pairs)
    with pytest.raises(UserError, match="not readable as Parquet"):
        read(written(tmp_path / "c.parquet", path.read_bytes()[:-30]))


def test_parquet_without_pyarrow(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'weft\[data\]'"):
        read(written(tmp_path / "a.parquet", b"PAR1"))


def test_folders_are_searched_in_order(tmp_path) -> None:
    for name in ("b.txt", "a.md", "sub/c.jsonl", "sub/code.py", ".hidden/d.txt", "sub/.e.txt", "model.bin"):
        written(tmp_path / name, "x")
    names = [str(path.relative_to(tmp_path)) for path in find_files([tmp_path]).train]
    assert names == ["a.md", "b.txt", "sub/c.jsonl"]
    assert [path.name for path in find_files([tmp_path], ["*.py"]).train] == ["code.py"]
    assert len(find_files([tmp_path, tmp_path / "b.txt"]).train) == 3  # listed twice, read once


@pytest.mark.parametrize("valid", ["valid.jsonl", "validation.txt", "val.parquet", "valid-00000-of-00002.jsonl.gz"])
def test_split_folders(tmp_path, valid: str) -> None:
    for name in ("train.jsonl", valid, "notes.txt"):
        written(tmp_path / name, "x")
    corpus = find_files([tmp_path])
    assert [path.name for path in corpus.train] == ["train.jsonl"]
    assert [path.name for path in corpus.valid] == [valid]
    assert [path.name for path in corpus.ignored] == ["notes.txt"]
    one_by_one = find_files([tmp_path / "train.jsonl", tmp_path / valid])
    assert [path.name for path in one_by_one.valid] == [valid]
    assert find_files([tmp_path / valid]).train == (tmp_path / valid,)  # alone it is a corpus like any other


def test_a_code_folder_called_train_is_no_split(tmp_path) -> None:
    for name in ("train/loop.py", "data/load.py", "train.py"):
        written(tmp_path / name, "x")
    assert len(find_files([tmp_path], ["*.py"]).train) == 3
    written(tmp_path / "valid/loop.py", "x")
    corpus = find_files([tmp_path], ["*.py"])
    assert [path.parent.name for path in corpus.train + corpus.valid] == ["train", "valid"]


def test_paths_that_lead_nowhere(tmp_path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        find_files([tmp_path / "none.txt"])
    with pytest.raises(UserError, match="no input"):
        find_files([])
    written(tmp_path / "code.py", "x")
    with pytest.raises(UserError, match=r"There are 1 \*\.py files: take them with --pattern '\*\.py'"):
        find_files([tmp_path])
    with pytest.raises(UserError, match="one JSON value"):
        find_files([written(tmp_path / "a.json", json.dumps([{"text": "x"}]))])
