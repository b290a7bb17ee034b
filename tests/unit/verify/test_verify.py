"""What is sound passes, on every shape and in every dtype; what is asked wrongly is a sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from verify_cases import checks, folder, run, spec, tokenizer

from weft.cli.main import main
from weft.errors import UserError
from weft.nn import build
from weft.spec import model_spec
from weft.verify import verify
from weft.verify.check import Check, Outcome
from weft.verify.prompts import built_in
from weft.weights.save import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {name: folder(name, parent) for name in ("llama", "ring", "sparse", "hybrid")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("ring", "float32"), ("ring", "bfloat16"), ("ring", "float16")]
    + [("sparse", "bfloat16")]
    + [("hybrid", dtype) for dtype in ("float32", "bfloat16", "float64")],
)
def test_sound_models_pass(name: str, dtype: str, folders: dict[str, Path]) -> None:
    report = run(folders[name], dtype)
    assert report.passed, [check.as_dict() for check in report.checks]
    assert report.dtype == dtype
    skipped = [check.name for check in report.checks if check.outcome.status == "skipped"]
    assert skipped == (["parity with transformers"] if name in ("sparse", "hybrid") else [])


def test_the_ring_wraps_and_prompts_leave_room(folders: dict[str, Path]) -> None:
    window = json.loads((folders["ring"] / "config.json").read_text())["sliding_window"]
    prompts = built_in(tokenizer(), spec("ring"), 12, 96)
    assert window < min(len(prompt.ids) for prompt in prompts if len(prompt.ids) > 1)
    assert all(0 < len(prompt.ids) <= 128 - 12 for prompt in prompts)
    assert 1 in {len(prompt.ids) for prompt in prompts}


def test_figures_are_measured(folders: dict[str, Path]) -> None:
    found = checks(folders["llama"])
    for name in ("parity with transformers", "incremental == parallel"):
        figure = found[name].outcome.figure
        assert figure is not None
        assert 0 < figure < 3e-5
    assert "bit for bit" in found["save == load"].outcome.detail


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    sizes = {"vocab": 61, "dim": 16, "context": 40, "init_std": 0.3, "layers": [{"mixer": {"type": "gru"}}]}
    path = save_model(build(model_spec(sizes), seed=0), tmp_path / "m")
    report = run(path)
    assert report.passed
    assert [check.name for check in report.checks if check.outcome.status == "skipped"] == ["parity with transformers", "one BOS"]


def test_own_prompts(folders: dict[str, Path], tmp_path: Path) -> None:
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("the river\n\ndef f(x):\n")
    rows.write_text('{"prompt": "the river"}\n{"text": "def f"}\n')
    for path in (lines, rows):
        report = verify(folders["llama"], device="cpu", dtype="float64", prompts=path, quick=True)
        assert report.passed
        batch = next(check for check in report.checks if check.name == "batch == single")
        assert batch.outcome.detail.startswith("2 prompts")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "  \n", "no prompts"),
        ("a.txt", "river " * 200, "line 1 has"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}\n', "line 2 has no text"),
        ("a.jsonl", '{"prompt": ', "line 1 is not valid JSON"),
    ],
)
def test_prompts_that_cannot_be_used(name: str, content: str, words: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        verify(folders["llama"], device="cpu", prompts=tmp_path / name, quick=True)


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"type": "attention", "heads": 2, "causal": False}, "causal"),
        ({"type": "cross_attention", "heads": 2, "memory_length": 5, "memory_dim": 8}, "memory"),
    ],
)
def test_a_model_that_continues_no_text_is_refused(mixer: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = save_model(build(model_spec({"vocab": 61, "dim": 16, "context": 40, "layers": [{"mixer": mixer}]})), tmp_path / "m")
    with pytest.raises(UserError, match=words):
        run(path)


def test_a_figure_that_is_no_number_fails_and_is_null_in_json() -> None:
    outcome = Outcome.measured(float("nan"), 1.0, "", "")
    assert outcome.status == "fail"
    assert json.loads(json.dumps(Check("x", outcome, 0.0).as_dict()))["figure"] is None


def test_transformers_is_loaded_by_its_check_alone(folders: dict[str, Path]) -> None:
    code = """
import sys
from weft.verify import run
assert "transformers" not in sys.modules
run.CHECKS = tuple(pair for pair in run.CHECKS if "transformers" not in pair[0])
run.verify(sys.argv[1], quick=True)
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(folders["llama"])], check=True)


def test_the_command(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def weft(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weft", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capfd.readouterr()

    code, out, err = weft(folders["llama"], "--quick", "--device", "cpu", "--dtype", "float32", "--json")
    assert code == 0
    assert "batch == single" in err
    report = json.loads(out)
    assert report["passed"] is True
    assert all({"name", "status", "figure", "limit", "detail"} <= set(check) for check in report["checks"])
    assert {check["status"] for check in report["checks"]} == {"pass"}

    model = build(spec("llama"), seed=2)
    with torch.no_grad():
        model.blocks[0].mixer.out.weight[0, 0] = float("nan")
    code, out, err = weft(save_model(model, tmp_path / "m", tokenizer()), "--quick", "--device", "cpu")
    assert code == 1
    assert "fail    batch == single" in out
    assert "Traceback" not in err

    assert weft(tmp_path / "none")[0] == 2
    assert weft(folders["llama"], "--dtype", "float13")[0] == 2
