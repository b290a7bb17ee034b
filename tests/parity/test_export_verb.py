"""`weft export` from the command line: the report, the default names, and mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from hf_cases import CASES, oracle

from weft.weights.load import load_model

RUN = "import sys; sys.argv = ['weft', *sys.argv[1:]]\nfrom weft.cli.main import main\nmain()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    oracle(next(case for case in CASES if case.name == "llama")).save_pretrained(tmp_path / "tiny")
    return tmp_path


def weft(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=False, cwd=folder)


def test_both_formats_with_default_names(folder: Path) -> None:
    done = weft(folder, "export", "./tiny", "--to", "gguf", "--dtype", "f16", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["path"], report["dtype"], report["format"], report["tokenizer"]) == ("tiny-f16.gguf", "f16", "gguf", False)
    assert "KL" in done.stderr
    assert weft(folder, "export", "tiny-f16.gguf", "--to", "hf", "-o", "back").returncode == 0
    expected = load_model(folder / "tiny").model
    given = load_model(folder / "back").model
    assert all(torch.equal(a.half().float(), b) or a.ndim == 1 for a, b in zip(expected.parameters(), given.parameters(), strict=True))
    hf.AutoModelForCausalLM.from_pretrained(folder / "back")


def test_mistakes_are_sentences_and_leave_nothing(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    for arguments, words in (
        (["./tiny", "--to", "onnx"], "unknown format 'onnx'"),
        (["./tiny", "--to", "hf", "--dtype", "q8_0"], "not q8_0"),
        (["./tiny", "--to", "gguf", "-o", "x.bin"], "does not end in .gguf"),
        (["./tinny", "--to", "gguf"], "tinny"),
    ):
        done = weft(folder, "export", *arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before
