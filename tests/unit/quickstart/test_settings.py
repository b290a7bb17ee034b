"""Options are checked, settings make possible recipes, and neither needs torch."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from weft.errors import UserError
from weft.quickstart.options import Options
from weft.quickstart.settings import Settings, Tokens
from weft.spec import model_spec
from weft.zoo import family_of


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, 1e9])
def test_impossible_times_are_refused(minutes):
    with pytest.raises(UserError, match="minutes is"):
        Options(minutes=minutes)


@pytest.mark.parametrize(("option", "value"), [("seed", -1), ("seed", 2**31), ("device", "gpu"), ("dtype", "float64")])
def test_other_impossible_options_are_refused(option, value):
    with pytest.raises(UserError, match=str(value)):
        replace(Options(), **{option: value})


def test_options_that_are_possible():
    assert Options(device="cuda:1", dtype="float32", minutes=0.01).out == Path("quickstart")


def test_the_model_is_a_llama_with_the_vocabulary_asked_for():
    spec = model_spec(Settings().model.spec(1234))
    assert spec.vocab == 1234
    assert family_of(spec).name == "llama"
    assert 1e6 < spec.num_params() < 2e7


def test_the_vocabulary_shrinks_with_the_corpus_and_not_below_its_least():
    tokens = Tokens(vocab=4096, bytes_per_entry=400, least=512)
    assert tokens.vocab_for(10_000_000) == 4096
    assert tokens.vocab_for(400 * 1000) == 960
    assert tokens.vocab_for(50_000) == 512


def test_neither_options_nor_settings_nor_the_verb_need_torch():
    script = "import sys, weft.quickstart.options, weft.quickstart.settings, weft.cli.quickstart; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
