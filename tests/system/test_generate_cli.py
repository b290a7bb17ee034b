"""`weft generate` as a person and as a program runs it."""

import json
import os
import re
import subprocess
import sys

import pytest
from generation_cases import Weft, make_model

from weft.cli.main import load
from weft.engine import Engine, Request, SamplingParams
from weft.tokenizer import load_tokenizer
from weft.weights.load import load_model

PROMPT = "Line 7: the quick"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def weft(monkeypatch, capfd):
    return Weft(monkeypatch, capfd)


@pytest.fixture(scope="module")
def expected(model):
    """Twelve greedy tokens, from the engine itself."""
    engine = Engine(load_model(model).model, load_tokenizer(model))
    return engine.generate([Request(PROMPT, SamplingParams(max_tokens=12))])[0]


def test_text_streams_to_stdout_and_speed_to_stderr(weft, model, expected):
    code, out, err = weft("generate", model, "-p", PROMPT, "--max-tokens", 12, "--dtype", "float32")
    assert (code, out) == (0, expected.text + "\n")
    assert "tokens/s" in err
    assert weft("generate", model, "-p", PROMPT, "--max-tokens", 12, "--dtype", "float32", "--no-stream")[1] == out


def test_json_is_the_last_line(weft, model, expected):
    code, out, _ = weft("generate", model, "-p", PROMPT, "--max-tokens", 12, "--dtype", "float32", "--json")
    assert code == 0
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["text"] == expected.text
    assert tuple(found["ids"]) == expected.ids
    assert found["finish_reason"] == "length"
    assert found["tokens_per_s"] > 0
    assert found["prompt_tokens"] == len(load_tokenizer(model).encode(PROMPT))
    assert "results" not in found
    assert "logprobs" not in found


def test_the_prompt_may_come_from_stdin(weft, model, expected):
    options = ("--max-tokens", 12, "--dtype", "float32")
    for arguments in (("-p", "-"), ()):
        for end in ("", "\n", "\r\n"):
            assert weft("generate", model, *arguments, *options, stdin=(PROMPT + end).encode())[1] == expected.text + "\n"


def test_several_prompts_and_samples(weft, model, expected):
    options = ("--max-tokens", 12, "--dtype", "float32", "--n", 2, "--seed", 4, "--temp", 0.9, "--top-p", 0.95, "--json")
    found = json.loads(weft("generate", model, "-p", PROMPT, "-p", "the lazy", *options)[1])
    assert [(result["prompt"], result["index"]) for result in found["results"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found["ids"] == found["results"][0]["ids"]
    assert found["results"][0]["ids"] != found["results"][1]["ids"]
    assert {result["seed"] for result in found["results"]} == {4}
    alone = json.loads(weft("generate", model, "-p", "the lazy", *options)[1])
    assert [result["ids"] for result in alone["results"]] == [result["ids"] for result in found["results"][2:]]
    out = weft("generate", model, "-p", PROMPT, "-p", "the lazy", "--max-tokens", 12, "--dtype", "float32")[1]
    assert out.startswith(f"==> prompt 1 <==\n{expected.text}\n")
    assert "==> prompt 2 <==\n" in out


def test_greedy_unless_asked_for_samples(weft, model, expected):
    def ids(*options):
        found = json.loads(weft("generate", model, "-p", PROMPT, "--max-tokens", 12, "--dtype", "float32", "--json", *options)[1])
        return tuple(found["ids"])

    assert ids("--seed", 5) == expected.ids
    assert ids("--temp", 0, "--top-k", 5) == expected.ids
    assert ids("--top-k", 50, "--seed", 5) == ids("--top-k", 50, "--seed", 5, "--temp", 1) != expected.ids
    assert ids("--presence-penalty", -50) != expected.ids


def test_beams_log_probabilities_and_stops(weft, model, expected):
    options = ("--max-tokens", 12, "--dtype", "float32", "--json")
    found = json.loads(weft("generate", model, "-p", PROMPT, "--beams", 3, "--n", 2, *options)[1])
    scores = [result["score"] for result in found["results"]]
    assert scores == sorted(scores, reverse=True)
    _, out, err = weft("generate", model, "-p", PROMPT, "--logprobs", "--top-logprobs", 2, *options)
    logprobs = json.loads(out)["logprobs"]
    assert [entry["id"] for entry in logprobs] == list(expected.ids)
    assert all(entry["top"][0][0] == entry["id"] and len(entry["top"]) == 2 for entry in logprobs)
    assert f"{logprobs[0]['logprob']:.4f}" in err
    stop = expected.text[5:8]
    found = json.loads(weft("generate", model, "-p", PROMPT, "--stop", stop, *options)[1])
    assert found["finish_reason"] == "stop"
    assert found["text"] == expected.text[: expected.text.index(stop)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-p", "a", "--temp", "-1"), "temperature is -1.0; give a finite number of at least 0."),
        (("-p", "a", "--temp", "nan"), "temperature is nan"),
        (("-p", "a", "--max-tokens", "0"), "max_tokens is 0"),
        (("-p", "a", "--top-p", "1.5"), "top_p is 1.5"),
        (("-p", "a", "--seed", "-3"), "seed is -3"),
        (("-p", "a", "--stop", ""), "a stop string is empty"),
        (("-p", "a", "--beams", "2", "--temp", "1"), "beams is 2 and temperature 1.0"),
        (("-p", "a", "--dtype", "float23"), "unknown dtype 'float23'. Did you mean 'float32'?"),
        (("-p", "a", "--device", "gpu"), "unknown device 'gpu'"),
        (("-p", "the lazy dog " * 60), "tokens and the model's context is 96; shorten the prompt."),
        (("-p", ""), "the prompt has no tokens"),
        (("-p", "-", "-p", "-"), "-p - is given twice"),
    ],
)
def test_mistakes_are_one_sentence(weft, model, options, message):
    code, out, err = weft("generate", model, *options)
    assert code == 2
    assert out == ""
    assert err.startswith("weft: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_is_no_model_or_no_text_is_refused(weft, tmp_path, model):
    code, _, err = weft("generate", tmp_path / "nothing", "-p", "a")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = weft("generate", model, "-p", "-", stdin=b"caf\xe9")
    assert code == 2
    assert "stdin is not UTF-8 (byte 3)" in err


SCHEMA = """{"type": "object", "required": ["n"], "additionalProperties": false,
  "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}"""


def test_a_schema_or_an_expression_is_followed(weft, model, tmp_path):
    (tmp_path / "schema.json").write_text(SCHEMA)
    for given in (SCHEMA, tmp_path / "schema.json"):
        code, out, _ = weft("generate", model, "-p", "the quick", "--json-schema", given, "--max-tokens", 40, "--json")
        assert code == 0
        assert list(json.loads(json.loads(out.splitlines()[-1])["text"])) == ["n"]
    code, out, _ = weft("generate", model, "-p", "the quick", "--regex", "[0-9]{3}", "--temp", 1)
    assert code == 0
    assert re.fullmatch("[0-9]{3}\n", out)


def test_a_form_that_cannot_be_followed_is_refused(weft, model, tmp_path):
    for given, said in (("{", "not valid JSON"), ('{"type": "nonsense"}', "Invalid type"), (tmp_path / "no.json", "no.json")):
        code, _, err = weft("generate", model, "-p", "a", "--json-schema", given)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    code, _, err = weft("generate", model, "-p", "a", "--regex", "(")
    assert (code, "unclosed group" in err) == (2, True)
    code, _, err = weft("generate", model, "-p", "a", "--regex", "a", "--json-schema", "{}")
    assert (code, "held to one" in err) == (2, True)


def test_the_command_itself_runs(model):
    command = [sys.executable, "-m", "weft.cli.main", "generate", str(model), "-p", "-", "--max-tokens", "3", "--json"]
    done = subprocess.run(command, input="the quick", capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["ids"]) == 3


def test_the_flags_are_what_scripts_rely_on():
    sampling = "--temp --top-k --top-p --min-p --repetition-penalty --presence-penalty --frequency-penalty --seed --stop"
    shared = f"{sampling} --max-tokens --device --dtype --draft --fast --state --adapter --json --help".split()
    generate = ["--prompt", "-p", "--n", "--beams", "--length-penalty", "--logprobs", "--top-logprobs", "--no-stream"]
    generate += ["--json-schema", "--regex"]
    for verb, own in (("generate", generate), ("chat", ["--system"])):
        flags = {flag for parameter in load(verb).params for flag in parameter.opts if flag.startswith("-")}
        assert flags | {"--help"} == {*shared, *own}


def test_drafts_change_the_speed_alone(weft, model, expected, tmp_path):
    options = ("generate", model, "-p", PROMPT, "--dtype", "float32", "--json", "--max-tokens")
    whole = json.loads(weft(*options, 60)[1])
    for draft in ("ngram", model):
        code, out, err = weft(*options, 60, "--draft", draft)
        assert (code, json.loads(out)["ids"]) == (0, whole["ids"])
    assert re.search(r"(\d+) of \1 drafted tokens stood", err), "who drafts with the model itself is always right"
    other = make_model(tmp_path / "other", vocab=280)
    code, _, err = weft(*options, 4, "--draft", other)
    assert code == 2
    assert "its tokenizer is another one" in err
    assert weft(*options, 4, "--draft", tmp_path / "nowhere")[0] == 2
