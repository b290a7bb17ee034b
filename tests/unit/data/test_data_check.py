"""`weft data check` as a user types it: what it finds, what it shows, and its exit codes."""

import json
import sys

import pytest

from record_cases import TALK, chat_tokenizer, write
from weft.cli.main import main
from weft.data.check_records import check_records
from weft.data.encode_records import RecordEncoder
from weft.data.record_kinds import Conversation
from weft.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat_tokenizer().save(tmp_path / "tok")
    write(tmp_path / "good.jsonl", [{"messages": list(TALK)}, {"messages": list(TALK[:2])}, {"messages": list(TALK[:2])}])
    write(tmp_path / "bad.jsonl", [{"messages": list(TALK)}, *({"messages": [{"role": "user", "content": ""}]} for _ in range(12))])
    return tmp_path


def weft(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["weft", "data", "check", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_good_records_are_counted_and_shown(folder, monkeypatch, capsys):
    assert weft(monkeypatch, "good.jsonl", "--model", "tok", "--objective", "sft", "--length", "49") == 0
    text = capsys.readouterr().out
    lengths = [RecordEncoder(chat_tokenizer()).conversation(Conversation(talk, "")).num_tokens for talk in (TALK, TALK[:2])]
    assert "good.jsonl: format messages, 3 records" in text
    assert "3 conversations" in text
    assert "records that say the same as an earlier one: 1\n" in text
    assert f"texts cut by rows of 49: 1, by {lengths[0] - 50} tokens in all" in text
    assert f"shortest {lengths[1]}, " in text
    assert "assistant\n{+It is four.<|im_end|>+}\n──" in text
    assert text.count("── good.jsonl:") == 3
    assert text.endswith("no errors\n")


def test_wrong_records_are_named_and_exit_with_2(folder, monkeypatch, capsys):
    assert weft(monkeypatch, "bad.jsonl", "--model", "tok") == 2
    text = capsys.readouterr().out
    assert "errors: 12, the first 10\n" in text
    assert text.count("column 'messages', message 1: 'content' is empty; write what is said there, or drop the record.") == 10
    assert "  bad.jsonl:2: column" in text
    assert weft(monkeypatch, "bad.jsonl", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["num_errors"], len(found["errors"])) == (1, 12, 10)
    assert found["files"] == [{"path": "bad.jsonl", "format": "messages", "records": 1}]


def test_colours_are_for_terminals_and_control_characters_for_nobody(folder, monkeypatch, capsys):
    write(folder / "sly.jsonl", [{"prompt": "a\x1b[31m", "completion": "b\x07"}])
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    assert weft(monkeypatch, "sly.jsonl", "--model", "tok") == 0
    text = capsys.readouterr().out
    assert "a[31m\x1b[32mb</s>\x1b[0m" in text
    assert "in green" in text


def test_a_long_text_is_shown_in_pieces_of_which_nothing_is_cut(folder):
    path = write(folder / "long.jsonl", [{"text": "the cat sat on the mat " * 9}])
    found = check_records(str(path), chat_tokenizer(), "sft", length=16)
    assert [sample.part for sample in found.samples] == ["piece 1", "piece 2", "piece 3"]
    assert max(found.lengths) == 17
    assert len(found.lengths) > 3
    assert (found.num_records, found.truncated, found.cut_tokens) == (1, 0, 0)


def test_every_kind_is_encoded_as_its_objective_reads_it(folder):
    rows = {
        "dpo": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen", "rejected"}),
        "classify": ({"text": "the cat", "label": 1}, {"label 1"}),
        "grpo": ({"question": "a?", "answer": "b"}, {"prompt"}),
    }
    for objective, (row, parts) in rows.items():
        path = write(folder / f"{objective}.jsonl", [row])
        found = check_records(str(path), chat_tokenizer(), objective)
        assert {sample.part for sample in found.samples} == parts
        assert not found.num_errors
        other = check_records(str(path), chat_tokenizer(), "dpo" if objective != "dpo" else "classify")
        assert other.num_errors == 1, "negative control: records of another objective"
    assert check_records(str(folder / "classify.jsonl")).labels == {"1": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl does not exist; give a file of records"),
        (["good.jsonl", "--objective", "stf"], "unknown objective 'stf'. Did you mean 'sft'?"),
        (["good.jsonl", "--model", "./none"], "there is no tokenizer at none"),
        (["empty.jsonl"], "there is no record in empty.jsonl"),
        (["good.jsonl", "--chat-template", "plain"], "--chat-template is given without --model"),
        (["good.jsonl", "--length", "9"], "--length is given without --model"),
    ],
)
def test_bad_input_is_one_sentence(folder, monkeypatch, capsys, arguments, message):
    (folder / "empty.jsonl").write_text("")
    assert weft(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_objective_is_refused_from_python():
    with pytest.raises(UserError, match="Allowed: classify, distill, dpo"):
        check_records("a.jsonl", objective="none")
