"""Every format of tuning data becomes records, and every row that is wrong is named with its column and what to do."""

import gzip
import json
import sys

import pytest

from paths import SHARED
from record_cases import TALK, write
from weft.data.read_records import TEXTS, FileRecords, iterate_records, read_records
from weft.data.record_kinds import Completion, Conversation, Labelled, PlainText, Preference, Prompt
from weft.errors import UserError

ASK, ANSWER = TALK[0], TALK[1]
OTHER = {"role": "assistant", "content": "Five."}
HUMAN = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: why?\n\nAssistant:"

CASES = {
    "messages": ({"messages": list(TALK)}, Conversation(TALK, "")),
    "tools": (
        {"messages": list(TALK), "tools": [{"type": "function", "function": {"name": "add"}}]},
        Conversation(TALK, "", ({"type": "function", "function": {"name": "add"}},)),
    ),
    "sharegpt": (
        {"system": "Brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        Conversation(
            ({"role": "system", "content": "Brief."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), ""
        ),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        Conversation(({"role": "user", "content": "Add.\n\n2 2"}, {"role": "assistant", "content": "4"}), ""),
    ),
    "gpteacher": (
        {"Instruction": "Add.", "Input": "", "Response": "4"},
        Conversation(({"role": "user", "content": "Add."}, {"role": "assistant", "content": "4"}), ""),
    ),
    "completion": ({"prompt": "2+2=", "completion": "4"}, Completion("2+2=", "4", "")),
    "completion of messages": ({"prompt": [ASK], "completion": [ANSWER]}, Completion((ASK,), (ANSWER,), "")),
    "preference": ({"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 2}, Preference("2+2=", "4", "5", "", 2.0)),
    "preference of messages": ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]}, Preference((ASK,), (ANSWER,), (OTHER,), "")),
    "preference with its prompt repeated": (
        {"prompt": ASK["content"], "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        Preference((ASK,), (ANSWER,), (OTHER,), ""),
    ),
    "implicit preference": ({"chosen": [*TALK[:3], ANSWER], "rejected": [*TALK[:3], OTHER]}, Preference(TALK[:3], (ANSWER,), (OTHER,), "")),
    "anthropic": (
        {"chosen": HUMAN + " I like it.", "rejected": HUMAN + " I think so."},
        Preference(HUMAN, " I like it.", " I think so.", ""),
    ),
    "implicit text": ({"chosen": "a bit of wine", "rejected": "a bit of water"}, Preference("a bit of", " wine", " water", "")),
    "labelled": ({"text": "fine", "label": 1}, Labelled("fine", 1, "")),
    "labelled sentence": ({"sentence": "fine", "label": "good"}, Labelled("fine", "good", "")),
    "question": (
        {"question": "2+2?", "answer": "#### 4"},
        Prompt(({"role": "user", "content": "2+2?"},), "", {"answer": "#### 4"}),
    ),
    "prompt": ({"prompt": "2+2=", "answer": 4}, Prompt("2+2=", "", {"answer": 4})),
    "text": ({"text": "a story"}, PlainText("a story", "")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_format_becomes_its_record(tmp_path, name):
    row, expected = CASES[name]
    path = write(tmp_path / "a.jsonl", [row])
    (record,) = read_records(path)
    assert record.origin == f"{path}:1"
    assert repr(record).replace(repr(record.origin), "''") == repr(expected)


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    rows = [{"prompt": 'a "b", c\n', "completion": "d\te"}, {"prompt": "ü", "completion": "f"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.csv").write_text('\ufeffprompt,completion\n"a ""b"", c\n","d\te"\nü,f\n', encoding="utf-8")
    names = ["a.json", "lines.json", "a.jsonl", "a.jsonl.gz", "a.csv"]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in [*names, "a.parquet"]:
        records = read_records(tmp_path / name)
        assert [(r.prompt, r.completion) for r in records] == [(row["prompt"], row["completion"]) for row in rows], name
    assert [r.origin.rsplit(":", 1)[1] for r in read_records(tmp_path / "a.csv")] == ["2", "4"], "the line a row begins on"


def test_nulls_that_parquet_fills_in_are_not_fields_of_a_message(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (record,) = read_records(tmp_path / "a.parquet", Conversation)
    assert record.messages == tuple(rows[0]["messages"])


def test_tables_without_a_header_are_text_and_label(tmp_path):
    (tmp_path / "a.tsv").write_text('a "fine film\t1\nno\t0\n')
    assert read_records(tmp_path / "a.tsv") == [
        Labelled('a "fine film', 1, f"{tmp_path}/a.tsv:1"),
        Labelled("no", 0, f"{tmp_path}/a.tsv:2"),
    ]
    (tmp_path / "b.tsv").write_text("sentence\tlabel\nyes\tgood\n")
    assert read_records(tmp_path / "b.tsv", Labelled) == [Labelled("yes", "good", f"{tmp_path}/b.tsv:2")]


def test_a_first_line_is_text_and_label_only_where_it_can_be_no_header(tmp_path):
    named, unknown = tmp_path / "named.csv", tmp_path / "reviews.csv"
    named.write_text("fine,good\n\nno,bad\nwell,good\n")
    assert [record.label for record in read_records(named)] == ["good", "bad", "good"], "good is a label of a later row"
    assert [record.label for record in read_records(named, Labelled)] == ["good", "bad", "good"]
    unknown.write_text("review,sentiment\nfine,good\nno,bad\nwell,good\n")
    for kind in (None, Labelled):
        with pytest.raises(UserError, match=r"reviews.csv:1: the first line .* known \(review, sentiment\); .* those that are: chosen, "):
            read_records(unknown, kind)
    with pytest.raises(UserError, match=r"named.csv:1: the first line has no column name that is known \(fine, good\)"):
        list(iterate_records(named, TEXTS))  # questions and answers, perhaps: nothing says that only the first is to be learned


def test_a_table_has_no_types_but_labels_and_margins_are_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,-1\nb, 1\nc,+0\n")
    assert [record.label for record in read_records(tmp_path / "a.csv", Labelled)] == [-1, 1, 0]
    (tmp_path / "b.tsv").write_text("worse\t-1\nbetter\t1\n")
    assert [record.label for record in read_records(tmp_path / "b.tsv")] == [-1, 1]
    (tmp_path / "c.csv").write_text("prompt,chosen,rejected,margin\np,a,b,1.5\np,a,c,\n")
    assert [pair.margin for pair in read_records(tmp_path / "c.csv", Preference)] == [1.5, 0.0]
    for wrong in ("much", "-1", "nan", "1e999"):
        (tmp_path / "d.csv").write_text(f"prompt,chosen,rejected,margin\np,a,b,{wrong}\n")
        with pytest.raises(UserError, match=r"d.csv:2: column 'margin' is .*; say by how much"):
            read_records(tmp_path / "d.csv", Preference)


@pytest.mark.parametrize(
    "content",
    ['text,label\na,1\n"b,0\nc,1\nd,0\n', 'text,label\na,1\n"b,0\n"c",1\n', 'text,label\na,1\n"b,0'],
    ids=["to the end", "up to the next quote", "cut"],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=r"a.csv:3: the row that begins here has quotes that do not close a cell"):
        read_records(tmp_path / "a.csv", Labelled, [])


def test_no_column_of_parquet_takes_the_place_of_another(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for names in (["text", "text"], ["text", "Text"]):
        parquet.write_table(pyarrow.table([["a"], ["b"]], names=names), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=rf"a.parquet: '{names[0]}' and '{names[1]}' are one name for two columns"):
            read_records(tmp_path / "a.parquet")


def test_columns_without_a_name_are_no_columns(tmp_path):
    (tmp_path / "a.csv").write_text(",text,label,\n0,a,1,\n")
    assert read_records(tmp_path / "a.csv", Labelled) == [Labelled("a", 1, f"{tmp_path}/a.csv:2")]


def test_ranked_answers_become_all_pairs_in_order(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"]},
        {"prompt": "q", "responses": ["a", "b", "c"], "ranking": [2, 1, 2]},
        {"prompt": "r", "responses": ["a", "b"], "scores": [0.1, 0.9]},
    ]
    pairs = read_records(write(tmp_path / "a.jsonl", rows), Preference)
    said = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    assert said == [("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"), ("q", "b", "a"), ("q", "b", "c"), ("r", "b", "a")]


def test_records_that_say_more_are_cut_down_to_what_is_wanted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": list(TALK)}])
    (prompt,) = read_records(path, Prompt)
    assert (prompt.prompt, prompt.facts) == (TALK[:3], {"completion": TALK[3:]})
    (prompt,) = read_records(write(tmp_path / "b.jsonl", [{"prompt": "p", "responses": ["a", "b", "c"]}]), Prompt)
    assert prompt.prompt == "p"
    (told,) = read_records(write(tmp_path / "c.jsonl", [{"question": "2+2?", "answer": "4"}]), Conversation)
    assert told.messages[1] == {"role": "assistant", "content": "4"}
    with pytest.raises(
        UserError, match=r"not the columns that are needed here \(it has text\)\. Give: prompt, responses; chosen, rejected"
    ):
        read_records(write(tmp_path / "d.jsonl", [{"text": "a"}]), Preference)
    with pytest.raises(UserError, match=r"column 'completion' is missing \(it has prompt, complation.*Did you mean 'complation'\?"):
        read_records(write(tmp_path / "e.jsonl", [{"prompt": "a", "complation": "b"}]), Completion)


TOOLS = ({"name": "add"},)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        {"prompt": [ASK], "responses": [[ANSWER], [OTHER]]},
        {"prompt": [ASK]},
        {"question": "2+2?", "answer": "4"},
        {"messages": [ASK, ANSWER]},
        {"instruction": "Add.", "output": "4"},
    ],
)
def test_tools_go_with_every_record_of_messages(tmp_path, row):
    path = write(tmp_path / "a.jsonl", [{**row, "tools": list(TOOLS)}])
    kinds = [None, Prompt, *([Conversation] if "question" in row else [])]
    assert [record.tools for kind in kinds for record in read_records(path, kind)] == [TOOLS] * len(kinds)
    assert [record.tools for record in read_records(write(tmp_path / "b.jsonl", [row]))] == [()], "control"


def test_tools_of_text_would_be_written_by_nothing(tmp_path):
    for row in (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "responses": ["b", "c"]},
    ):
        with pytest.raises(
            UserError, match=r"a.jsonl:1: column 'tools' is given, but no chat template writes it before text; give messages"
        ):
            read_records(write(tmp_path / "a.jsonl", [{**row, "tools": list(TOOLS)}]))
    (prompt,) = read_records(write(tmp_path / "a.jsonl", [{"prompt": "a", "tools": "some"}]))
    assert (prompt.facts, prompt.tools) == ({"tools": "some"}, ()), "a column like another"


def _user(text):
    return {"role": "user", "content": text}


BAD = {
    "missing column": ({"prompt": "a", "chosen": "b"}, "column 'rejected' is missing"),
    "misspelt column": ({"chosen": "a", "rejectd": "b"}, "Did you mean 'rejectd'"),
    "no known column": ({"foo": "a"}, "no columns of a known format (it has foo)"),
    "null column": ({"prompt": "a", "completion": None}, "column 'completion' is null"),
    "empty turn": ({"messages": [_user("  "), ANSWER]}, "column 'messages', message 1: 'content' is empty"),
    "no content": ({"messages": [{"role": "user"}, ANSWER]}, "message 1: 'content' is null, not a string"),
    "content of parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "is a list of parts"),
    "two users in a row": ({"messages": [ASK, ASK, ANSWER]}, "message 2 is from user after user"),
    "assistant first": ({"messages": [ANSWER, ASK]}, "message 1 is from assistant at the beginning"),
    "late system": ({"messages": [ASK, {"role": "system", "content": "x"}, ANSWER]}, "message 2 is from system after user"),
    "unknown role": ({"messages": [{"role": "asistant", "content": "x"}]}, "'role' is 'asistant'. Did you mean 'assistant'?"),
    "no answer": ({"messages": [ASK]}, "has no assistant message, so there is nothing to learn"),
    "no list": ({"messages": "hi"}, "column 'messages' is a string, not a list of messages"),
    "empty list": ({"messages": []}, "is an empty list"),
    "no string": ({"prompt": 3, "completion": "a"}, "column 'prompt' is a number, not a string"),
    "half a character": ({"text": "a\ud800"}, "half of a surrogate pair"),
    "equal answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "and 'rejected' are the same answer"),
    "equal conversations": ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "are the same answer"),
    "nothing in common": ({"chosen": "xa", "rejected": "yb"}, "share no beginning that could be the prompt"),
    "an empty answer": ({"chosen": HUMAN, "rejected": HUMAN + " a"}, "the answer in column 'chosen' is empty"),
    "text and messages": ({"prompt": "a", "completion": [ANSWER]}, "column 'prompt' is text, but 'completion' is messages"),
    "prompt ends with the answer": (
        {"prompt": [ASK, ANSWER], "completion": [ANSWER]},
        "column 'prompt' ends with a message from assistant",
    ),
    "label missing": ({"text": "a", "label": None}, "column 'label' is null"),
    "label of no class": ({"text": "a", "label": 0.5}, "column 'label' is a number (0.5), not a class"),
    "bad margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}, "column 'margin' is -1"),
    "endless margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "column 'margin' is 1000000"),
    "one answer": ({"prompt": "a", "responses": ["b"]}, "no list of two answers or more"),
    "ranks of another length": ({"prompt": "a", "responses": ["b", "c"], "ranking": [1]}, "one number for each of the 2 responses"),
    "all alike": ({"prompt": "a", "responses": ["b", "c"], "ranking": [1, 1]}, "ranks all answers alike"),
    "labelled completions": ({"prompt": "a", "completion": "b", "label": True}, "answers with a label each"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_row_is_one_sentence_with_its_place(tmp_path, name):
    row, message = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as told:
        read_records(path)
    assert str(told.value).startswith(f"{path}:1")
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl:2: bad JSON"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "a"}\n', "a.jsonl:2: column 'text' is missing"),
        ("a.jsonl", "\n\n", "there is no record in"),
        ("a.json", "[{}", "a.json:1: bad JSON at column 4"),
        ("a.json", "3", "is a number, not a list of records"),
        ("a.json", "[3]", "a.json:1: the record is a number, not an object"),
        ("a.csv", "text,label\na,1,2\n", "a.csv:2: the row has 3 columns, but the file 2 (text, label)"),
        ("a.csv", "a,b,c\n", "the first line has no column name that is known (a, b, c)"),
        ("a.txt", "a", "is no file of records, judged by its name"),
        ("a.parquet", "no", "not readable as Parquet"),
        # One of two columns of a name would take the place of the other.
        ("a.csv", "text,label,text\na,1,b\n", "a.csv:1: 'text' and 'text' are one name for two columns"),
        ("a.tsv", "Text\tlabel\ttext\na\t1\tb\n", "a.tsv:1: 'Text' and 'text' are one name"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "a.jsonl:1: bad JSON (the key 'text' comes twice in one object)"),
        ("a.jsonl", '{"messages": [{"role": "user", "role": "user"}]}\n', "a.jsonl:1: bad JSON (the key 'role' comes twice"),
        ("a.jsonl", '{"text": "a", "Text": "b"}\n', "a.jsonl:1: 'text' and 'Text' are one name"),
        ("a.json", '[{"text": "a", "text": "b"}]', "a.json: bad JSON (the key 'text' comes twice in one object)"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as told:
        read_records(tmp_path / name)
    assert message in str(told.value)


def test_a_path_that_is_no_file_may_be_a_dataset(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        read_records(tmp_path / "none.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"there is no file someone/something, and the hub's need: pip install 'weft\[datasets\]'"):
        read_records("someone/something")

    class Hub:
        @staticmethod
        def load_dataset(name, split):
            if name != "someone/something":
                raise OSError("no such dataset")
            return [{"text": f"{split} a"}]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert read_records("someone/something:test") == [PlainText("test a", "someone/something:test:1")]
    with pytest.raises(UserError, match=r"could be fetched \(no such dataset\)"):
        read_records("someone/other")


def test_wrong_rows_are_left_out_on_request_and_all_are_found(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": 3}, {"text": "b"}])
    dropped: list[UserError] = []
    assert [record.text for record in read_records(path, PlainText, dropped)] == ["a", "b"]
    assert [str(error).split(": ")[0] for error in dropped] == [f"{path}:2", f"{path}:3"]
    assert [type(found) for found in FileRecords(path)] == [PlainText, UserError, UserError, PlainText]
    with pytest.raises(UserError, match="all of 1 rows are wrong"):
        read_records(write(tmp_path / "b.jsonl", [{"text": ""}]), PlainText, [])


@pytest.mark.parametrize(
    ("name", "kind", "good", "bad"),
    [
        ("gpteacher-roleplay.json", Conversation, 3146, 0),
        ("hh-rlhf-harmless-1k.jsonl", Preference, 997, 3),
        ("sst2-train.tsv", Labelled, 6920, 0),
        ("gsm8k-train-4k.jsonl", Prompt, 4000, 0),
    ],
)
def test_published_data_is_read(name, kind, good, bad):
    if SHARED is None:
        pytest.skip("needs shared/data/supervised")
    found = list(FileRecords(SHARED / "supervised" / name))
    assert sum(isinstance(record, kind) for record in found) == good
    assert sum(isinstance(record, UserError) for record in found) == bad
    if kind is Preference:
        assert all(record.prompt.endswith("\n\nAssistant:") for record in found if isinstance(record, Preference))
