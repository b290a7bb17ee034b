"""The command itself: what loads when, and how mistakes are told."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weft.cli.main import VERBS, load

WEFT = [sys.executable, "-m", "weft.cli.main"]


def run(*arguments, **environment):
    return subprocess.run([*WEFT, *arguments], capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"], ["models", "--json"], ["models", "gpt2"]])
def test_light_verbs_do_not_load_torch(arguments):
    code = f"""
import sys
sys.argv = ["weft", *{arguments!r}]
from weft.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def seconds(*command):
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def test_help_takes_under_half_of_importing_torch():
    """Interleaved, and the smallest of several: what is compared is work, not the machine's mood."""
    pairs = [(seconds(*WEFT, "--help"), seconds(*WEFT, "models"), seconds(sys.executable, "-c", "import torch")) for _ in range(4)]
    help_time, models_time, torch_time = (min(column) for column in zip(*pairs, strict=True))
    assert help_time < torch_time / 2
    assert models_time < torch_time / 2


def test_every_verb_loads_and_explains_itself():
    for verb in VERBS:
        command = load(verb)
        assert command.name == verb
        assert command.help, verb


def test_every_verb_takes_json():
    for verb in VERBS:
        command = load(verb)
        leaves = list(command.commands.values()) if hasattr(command, "commands") else [command]
        for leaf in leaves:
            assert "--json" in {option for parameter in leaf.params for option in parameter.opts}, f"{verb} {leaf.name}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["modls"], "there is no verb 'modls'. Did you mean 'models'?"),
        (["models", "gpt22"], "gpt2"),
        (["models", "--famly", "gpt2"], "No such option"),
        (["generate", "/no/such/folder", "-p", "x"], "/no/such/folder"),
    ],
)
def test_mistakes_are_sentences_with_exit_code_2(arguments, sentence):
    done = run(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback():
    done = run("models", "gpt22", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_completion_offers_verbs_without_loading_them():
    script = Path(sys.executable).with_name("weft")
    environment = os.environ | {"_WEFT_COMPLETE": "complete_bash", "COMP_WORDS": "weft mo", "COMP_CWORD": "1"}
    done = subprocess.run([script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["models"]
    environment |= {"COMP_WORDS": "weft models --fa", "COMP_CWORD": "2"}
    done = subprocess.run([script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["--family"]
