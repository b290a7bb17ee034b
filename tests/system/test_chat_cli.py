"""`weft chat` with what is typed coming from a pipe."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from generation_cases import TEMPLATE, Weft, make_model

from weft.cli.chat_commands import COMMANDS, Session, run_command
from weft.engine import Engine, Request, SamplingParams
from weft.engine.conversation import Conversation
from weft.engine.open import generation_defaults
from weft.errors import UserError
from weft.tokenizer import load_tokenizer
from weft.weights.load import load_model

OPTIONS = ("--dtype", "float32", "--max-tokens", "6", "--temp", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def weft(monkeypatch, capfd):
    return Weft(monkeypatch, capfd)


@pytest.fixture
def conversation(model):
    return Conversation(Engine(load_model(model).model, load_tokenizer(model), rows=1, chunk=16, page=4))


def say(conversation, text, params=None):
    for _ in conversation.ask(text, params or SamplingParams(max_tokens=6)):
        pass
    return conversation.messages[-1]["content"]


def test_a_conversation_from_a_pipe(weft, model):
    typed = "the quick\nthe lazy dog\n/quit\nnever read\n"
    code, out, err = weft("chat", model, *OPTIONS, "--json", "--system", "Be a fox.", stdin=typed.encode())
    assert code == 0
    found = json.loads(out)
    roles = [message["role"] for message in found["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert found["tokens_per_s"] > 0
    assert err.count("tokens/s") == 2
    engine, tokenizer = Engine(load_model(model).model, load_tokenizer(model)), load_tokenizer(model)
    for turn in (2, 4):
        prompt = tokenizer.apply_chat(found["messages"][:turn])
        answer = engine.generate([Request(prompt, SamplingParams(max_tokens=6))])[0]
        assert found["messages"][turn]["content"] == answer.text
    shown = weft("chat", model, *OPTIONS, "--system", "Be a fox.", stdin=typed.encode())[1]
    assert shown == "".join(message["content"] + "\n" for message in found["messages"] if message["role"] == "assistant")


def test_only_what_is_new_is_fed(conversation):
    cached, computed = [], []
    answers = []
    for text in ("the quick", "fox", "dog"):
        answers.append(say(conversation, text))
        cached.append(conversation.engine.stats.cached_prompt_tokens)
        computed.append(conversation.engine.stats.prompt_tokens)
    first, second = computed[0], sum(computed[:1]) + cached[1]
    assert cached[0] == 0
    assert cached[1] >= first - 4
    assert cached[2] - cached[1] >= second - 4
    fresh = Conversation(Engine(conversation.engine.model, conversation.tokenizer, cache=False))
    assert [say(fresh, text) for text in ("the quick", "fox", "dog")] == answers


def test_commands(weft, model, tmp_path):
    file = tmp_path / "talk.json"
    typed = f"""/set temp 0.5
/set
/system Speak.
the quick
/save {file}
/reset
the lazy
/load {file}
/set max_tokens 3
/system
fox\\
jumps
/help
/exit
"""
    code, out, err = weft("chat", model, *OPTIONS, "--seed", "1", "--json", stdin=typed.encode())
    assert code == 0, err
    assert "temp 0.5" in err
    assert "seed 1" in err
    assert all(name in err for name in COMMANDS)
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    messages = json.loads(out)["messages"]
    assert messages[:2] == saved[1:], "loaded again; its system prompt was then taken away"
    assert messages[2] == {"role": "user", "content": "fox\njumps"}
    assert len(messages) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sett temp 1", "unknown command '/sett'. Did you mean '/set'?"),
        ("/set tmep 1", "unknown setting 'tmep'. Did you mean 'temp'?"),
        ("/set temp warm", "temp is 'warm'; give a number"),
        ("/set temp -1", "temperature is -1.0"),
        ("/set top-k 1.5", "top-k is '1.5'"),
        ("/save", "/save needs a file name"),
        ("/load", "/load needs a file name"),
        ("/load nothing.json", "there is no file nothing.json"),
    ],
)
def test_mistaken_commands_are_told_and_change_nothing(conversation, line, message):
    session = Session("small", conversation, SamplingParams(temperature=0.3))
    with pytest.raises(UserError) as told:
        run_command(session, line)
    assert message in str(told.value)
    assert session.params == SamplingParams(temperature=0.3)


def test_a_mistake_in_a_pipe_ends_with_2(weft, model):
    code, _, err = weft("chat", model, *OPTIONS, stdin=b"/set tmep 1\n")
    assert code == 2
    assert err.startswith("weft: unknown setting")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"messages": [{"role": "king", "content": "x"}]}', '{"messages": "no"}'])
def test_a_file_that_is_no_conversation_is_refused(conversation, tmp_path, content):
    say(conversation, "fox")
    before = list(conversation.messages)
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError):
        conversation.load(tmp_path / "bad.json")
    assert conversation.messages == before


def test_a_conversation_longer_than_the_context_is_refused_and_kept(conversation):
    say(conversation, "fox")
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens and the model's context is 96; begin anew with /reset"):
        say(conversation, "the lazy dog " * 40)
    assert conversation.messages == before
    assert say(conversation, "dog")


def test_an_answer_can_be_stopped(conversation):
    count = []
    for _ in conversation.ask("fox", SamplingParams(max_tokens=40), lambda: len(count) >= 3):
        count.append(1)
    assert len(count) == 3
    assert conversation.result.finish_reason == "cancelled"
    assert conversation.messages[-1] == {"role": "assistant", "content": conversation.result.text}
    assert not conversation.engine.busy
    assert say(conversation, "dog")


def test_a_model_without_a_chat_template_says_what_to_do(weft, tmp_path):
    plain = make_model(tmp_path / "plain", chat=False)
    code, _, err = weft("chat", plain, stdin=b"hi\n")
    assert code == 2
    assert "has no chat template" in err
    assert f"weft generate {plain} -p" in err


def test_a_templates_own_objection_is_told(conversation):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}" + TEMPLATE
    conversation.tokenizer.settings = replace(conversation.tokenizer.settings, chat_templates={"default": refusing})
    conversation.set_system("Be a fox.")
    with pytest.raises(UserError, match="no system prompts"):
        say(conversation, "fox")
    conversation.set_system(None)
    assert say(conversation, "fox")


def test_recommended_settings_are_taken(weft, tmp_path):
    path = make_model(tmp_path / "model")
    assert generation_defaults(path) == {}
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}))
    assert generation_defaults(path) == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert "temp 0.6, top-k 20, top-p 0.9, max-tokens 1024" in weft("chat", path, stdin=b"/set\n")[2]
    assert "temp 0.1, top-k 20" in weft("chat", path, "--temp", "0.1", stdin=b"/set\n")[2]
    (path / "generation_config.json").write_text(json.dumps(config | {"do_sample": False, "temperature": 0.6}))
    assert generation_defaults(path) == {}
    assert "temp 0.7" in weft("chat", path, stdin=b"/set\n")[2]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_the_answer_and_not_the_chat(tmp_path):
    path = make_model(tmp_path / "long", context=100_000)
    options = ["--dtype", "float32", "--max-tokens", "90000", "--temp", "0", "--json"]  # greedily this model never comes to an end
    command = [sys.executable, "-m", "weft.cli.main", "chat", str(path), *options]
    chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killer = threading.Timer(120, chat.kill)
    killer.start()
    try:
        chat.stdin.write("fox\n")
        chat.stdin.flush()
        assert chat.stderr.read(1), "the answer streams to stderr beside --json"
        time.sleep(0.3)
        chat.send_signal(signal.SIGINT)
        out, err = chat.communicate("/set max-tokens 2\ndog\n")
    finally:
        killer.cancel()
        chat.kill()
    assert chat.returncode == 0, err
    assert "interrupted" in err
    messages = json.loads(out)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
