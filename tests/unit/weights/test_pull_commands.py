"""`weft pull`, `weft list` and `weft rm` as a person runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weft.weights.files import write_safetensors


@pytest.fixture
def weft(tmp_path):
    """Run the command in an empty folder with an empty cache: (exit code, stdout, stderr)."""
    environment = {**os.environ, "WEFT_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "140"}

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-c", "from weft.cli.main import main; main()", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "trained"
    write_safetensors(path, [("a", torch.rand(1000))])
    (path / "config.json").write_text("{}")
    return path


def test_a_life_in_the_cache(weft, folder, tmp_path):
    code, out, err = weft("list")
    assert (code, out) == (0, "")
    assert "weft pull smollm2-135m" in err

    code, out, err = weft("pull", "./trained", "--name", "mine", "--json")
    assert code == 0
    assert len(out.splitlines()) == 1
    pulled = json.loads(out)
    assert pulled["name"] == "mine"
    assert pulled["files"] == ["config.json", "model.safetensors"]
    assert Path(pulled["path"]).is_dir()
    assert err.startswith("mine is here: 4.1 kB, 2 files")

    code, out, _ = weft("list")
    assert code == 0
    assert all(word in out for word in ("mine", "4.1 kB", "path:", "ok"))

    (Path(pulled["path"]) / "config.json").write_text("[]")
    (entry,) = json.loads(weft("list", "--json")[1])
    assert entry["damaged"] == [], "the size is right"
    (entry,) = json.loads(weft("list", "--verify", "--json")[1])
    assert entry["damaged"] == ["config.json"]
    assert "damaged" in weft("list", "--verify")[1]

    code, out, err = weft("rm", "mine")
    assert (code, out) == (2, "")
    assert "weft rm mine --yes" in err
    code, out, _ = weft("rm", "mine", "--yes", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "mine"
    assert json.loads(weft("list", "--verify", "--json")[1]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pull", "smollm2-135m", "--offline"), "'smollm2-135m' is not in the cache, and --offline"),
        (("pull", "./absent", "--name", "x"), "there is no file or folder absent"),
        (("pull", "./trained"), "--name NAME"),
        (("pull", "./trained", "--name", "../x"), "cannot name a model"),
        (("rm", "absent", "--yes"), "there is no pulled model 'absent'"),
        (("rm", "./trained", "--yes"), "is not the name of a pulled model"),
    ],
)
def test_mistakes_give_one_sentence(weft, folder, arguments, message):
    code, out, err = weft(*arguments, "--json")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("weft: ")
    assert len(err.splitlines()) == 1
    assert (folder / "config.json").is_file()
