"""The main job on a small corpus: whole, interrupted and carried on, through the command line, and refused where it must be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from weft.cli.main import main
from weft.errors import UserError
from weft.quickstart.options import Options
from weft.quickstart.pipeline import quickstart
from weft.quickstart.reporter import Silent
from weft.quickstart.settings import FineTuning, Judging, ModelSettings, Pretraining, Reinforcing, Settings, Tokens
from weft.quickstart.training import Interrupted
from weft.tokenizer import load_tokenizer
from weft.weights.load import load_model

MODULES = (
    "argparse",
    "ast",
    "bdb",
    "calendar",
    "cmd",
    "code",
    "configparser",
    "csv",
    "difflib",
    "dis",
    "enum",
    "fractions",
    "ftplib",
    "glob",
)
SMALL = Settings(
    heldout=0.15,
    tokens=Tokens(vocab=800),
    model=ModelSettings(dim=48, layers=2, heads=3, kv_heads=3, hidden=96, context=128),
    pretraining=Pretraining(rows=4, length=64, warmup=2),
    fine_tuning=FineTuning(rows=4, length=64, fewest=10),
    reinforcing=Reinforcing(rows=2, samples=3, length=96, max_tokens=16, fewest=5),
    judging=Judging(samples=6, max_tokens=12),
    eval_batches=1,
    steps=8,
    compile=False,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        shutil.copy(stdlib / f"{name}.py", folder)
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "quickstart"
    return out, quickstart(Options(out, corpus, device="cpu"), SMALL)


def test_the_report_is_complete(whole, corpus):
    out, report = whole
    assert report == json.loads((out / "quickstart.json").read_text())
    assert report["corpus"]["name"] == str(corpus)
    assert report["corpus"]["train_bytes"] + report["corpus"]["heldout_bytes"] == report["corpus"]["bytes"]
    assert set(report["baselines"]) == {"gzip", "byte_5gram", "xz", "xz_given_training"}
    stages = [report[f"bits_per_byte{stage}"] for stage in ("", "_fine_tuned", "_reinforced")]
    assert all(0.5 < bits < 8 for bits in (*report["baselines"].values(), *stages))
    assert report["reinforcement"]["steps"] == 8
    assert report["reinforcement"]["kl"] >= 0
    assert report["tokens"]["pretrain"] == 8 * 4 * 64
    for when in ("before", "after", "reinforced"):
        share = report["parse_share"][when]
        assert share["samples"] == 6
        assert share["low"] <= share["share"] <= share["high"]
    assert len(report["samples"]) == 3
    assert report["peak_memory_bytes"] > 50_000_000
    assert (out / "quickstart.png").read_bytes()[:4] == b"\x89PNG"
    card = (out / "quickstart.md").read_text()
    assert f"{report['bits_per_byte']:.4f}" in card
    assert report["samples"][0].rstrip() in card


def test_no_held_out_text_is_trained_on(whole):
    out, report = whole
    sides = {side: (out / "work/corpus" / f"{side}.jsonl").read_text() for side in ("train", "valid")}
    names = {side: {Path(json.loads(line)["path"]).stem for line in text.splitlines()} for side, text in sides.items()}
    assert not names["train"] & names["valid"]
    assert names["valid"] == set(report["corpus"]["heldout_units"])
    prompts = [json.loads(line)["prompt"] for line in (out / "work/pairs/train.jsonl").read_text().splitlines()]
    training = "".join(json.loads(line)["text"] for line in sides["train"].splitlines())
    assert all(prompt.splitlines()[0] in training for prompt in prompts)


def test_training_lowers_the_bits_and_fine_tuning_changes_the_model(whole):
    out, _ = whole
    curve = json.loads((out / "work/steps/pretrain.json").read_text())["result"]["curve"]
    assert curve["train"][-1][1] < curve["train"][0][1]
    base, tuned, reinforced = (load_model(out / name).model.embed.weight for name in ("base", "model", "reinforced"))
    assert not torch.equal(base, tuned)
    assert reinforced.shape == tuned.shape  # of this model no body parses, so no reward teaches it anything


def test_transformers_loads_the_model_and_agrees(whole, monkeypatch):
    transformers = pytest.importorskip("transformers")
    out, _ = whole
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    text = "def double(x):\n    return 2 * x\n"
    ids = load_tokenizer(out / "model").encode(text)
    assert transformers.AutoTokenizer.from_pretrained(out / "model")(text)["input_ids"] == ids
    tokens = torch.tensor([ids])
    ours = load_model(out / "model", dtype=torch.float32).model
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours(tokens).logits).abs().max()
        assert difference < 3e-5
        assert (theirs(tokens).logits - load_model(out / "base", dtype=torch.float32).model(tokens).logits).abs().max() > 1e-3


def test_the_same_command_again_does_nothing_twice(whole, corpus):
    out, report = whole
    told = Listener()
    again = quickstart(Options(out, corpus, device="cpu"), SMALL, reporter=told)
    assert again == report
    assert told.known == [False, True, True, True, True, True, True, False]  # reading and writing the report are always done


class Listener(Silent):
    """Notes which steps were known, and interrupts this process as Ctrl-C does after some steps of training."""

    def __init__(self, title: str = "", after: int = 0) -> None:
        self.known: list[bool] = []
        self.wanted, self.after = title, after
        self.title = ""

    def begin(self, number, count, title):
        self.title = title

    def advance(self, done, total, note=""):
        if self.wanted and self.wanted in self.title and "loss" in note and done >= self.after:
            self.wanted = ""
            os.kill(os.getpid(), signal.SIGINT)

    def end(self, line, known):
        self.known.append(known)


def test_an_interrupted_job_carries_on_to_the_same_weights(whole, corpus, tmp_path):
    out, report = whole
    options = Options(tmp_path / "quickstart", corpus, device="cpu")
    for title in ("pretraining", "fine-tuning", "reinforcing"):
        with pytest.raises(Interrupted):
            quickstart(options, SMALL, reporter=Listener(title, 3))
    carried = quickstart(options, SMALL)
    for name in ("base", "model", "reinforced"):
        ours, theirs = (dict(load_model(folder / name).model.named_parameters()) for folder in (options.out, out))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for key in ("bits_per_byte", "bits_per_byte_fine_tuned", "parse_share", "samples"):
        assert carried[key] == report[key]


def test_another_seed_gives_another_model_of_the_same_split(whole, corpus, tmp_path):
    out, report = whole
    shutil.copytree(out, tmp_path / "copy")
    other = quickstart(Options(tmp_path / "copy", corpus, seed=1, device="cpu"), replace(SMALL, steps=4))
    assert other["bits_per_byte"] != report["bits_per_byte"]
    assert other["baselines"] == report["baselines"]
    assert other["corpus"] == report["corpus"]


def test_prose_skips_fine_tuning_and_says_why(tmp_path):
    book = "".join(
        f"Chapter {i}. It was a dark night, and number {i * i % 97} went out for bread and {i % 13} eggs.\n\n" for i in range(900)
    )
    (tmp_path / "book.txt").write_text(book)
    report = quickstart(Options(tmp_path / "out", tmp_path / "book.txt", device="cpu"), SMALL)
    assert "not Python" in report["fine_tuning_skipped"]
    assert report["parse_share"] == {}
    assert report["bits_per_byte_fine_tuned"] is None
    assert report["reinforcement_skipped"] == "there is no fine-tuned model"
    assert report["corpus"]["split"] == "tails"
    assert len(report["samples"]) == 3
    assert "not Python" in (tmp_path / "out" / "quickstart.md").read_text()


def weft(*arguments, cwd):
    command = [sys.executable, "-m", "weft.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)


def test_the_command_line(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weft.quickstart.settings.Settings", lambda compile: replace(SMALL, steps=3, compile=compile))
    monkeypatch.setattr(sys, "argv", ["weft", "quickstart", "--corpus", str(corpus), "--no-compile", "--device", "cpu", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert json.loads(said.out) == json.loads((tmp_path / "quickstart/quickstart.json").read_text())
    for words in ("8/8", "reinforced", "xz -9", "sample 3", "weft generate quickstart/model", "quickstart/quickstart.md"):
        assert words in said.err


@pytest.mark.slow
def test_the_command_line_as_people_run_it(corpus, tmp_path):
    ran = weft("quickstart", "--corpus", corpus, "--minutes", 0.01, "--no-compile", "--device", "cpu", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert len(ran.stdout.splitlines()) == 1
    assert report == json.loads((tmp_path / "quickstart/quickstart.json").read_text())
    assert "weft generate quickstart/model" in ran.stderr
    assert "xz -9" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "-1"], "minutes is -1"),
        (["--minutes", "0"], "minutes is 0"),
        (["--minutes", "nan"], "minutes is nan"),
        (["--minutes", "soon"], "'--minutes'"),
        (["--seed", "-3"], "seed is -3"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--corpus", "nowhere"], "there is no folder nowhere"),
        (["--corpsu", "nowhere"], "--corpsu"),
        (["--out", "taken"], "taken holds other files"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, words, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    ran = weft("quickstart", *arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["letter.txt"]


def test_a_second_quickstart_in_the_same_folder_waits_its_turn(tmp_path):
    from weft.quickstart.workplace import Workplace

    place = Workplace(tmp_path / "out")
    with pytest.raises(UserError, match="another quickstart is at work"):
        Workplace(tmp_path / "out")
    place.release()
    Workplace(tmp_path / "out").release()


def test_a_finished_job_is_known_by_its_report_when_its_work_is_deleted(whole, tmp_path):
    from weft.quickstart.workplace import check_out

    shutil.copytree(whole[0], tmp_path / "out", ignore=shutil.ignore_patterns("work"))
    check_out(tmp_path / "out")
    (tmp_path / "out" / "quickstart.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        check_out(tmp_path / "out")
