"""`weft train` from the command line: what it prints, what it leaves, and what it says to bad input."""

import json
import shutil
from pathlib import Path

import pytest
from train_runs import Host, losses, make_inputs

from weft.cli.train import closing

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_inputs(folder)
    host = Host(folder)
    yield host
    host.close()


def _said(host: Host, *arguments: str) -> tuple[int, str]:
    """Exit code, and what this one command printed."""
    path = host.folder / "output.txt"
    path.unlink(missing_ok=True)
    code = host.run("train", *arguments)
    return code, path.read_text()


@pytest.fixture(scope="module")
def finished(host):
    code, text = _said(host, "recipe.yaml", "out=done", "steps=4", "--json")
    assert code == 0, text
    return text


def test_the_last_line_is_the_run_card(host, finished):
    card = json.loads(finished.splitlines()[-1])
    assert card["status"] == "finished"
    assert card["run"]["steps_done"] == 4
    assert card["data"][0]["source"] == "text.txt"
    assert set(card["cost"]) >= {"seconds", "tokens", "tokens_per_s", "flops", "mfu", "peak_memory_bytes"}
    assert json.loads((host.folder / "done/run.json").read_text()) == {"format": "weft-run", **card}
    assert "held-out" in finished
    assert "tok/s" in finished
    assert "next: weft generate done/best" in finished


def test_transformers_loads_what_was_trained(host, finished):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(host.folder / "done/best")
    tokenizer = transformers.AutoTokenizer.from_pretrained(host.folder / "done/best")
    assert model.config.vocab_size == len(tokenizer) == 257
    assert tokenizer.decode(tokenizer("weft").input_ids) == "weft"


def test_a_model_that_learned_to_answer_is_to_be_talked_to(host, finished, tmp_path):
    card = {**json.loads((host.folder / "done/run.json").read_text()), "out": str(tmp_path)}
    tuned = {**card, "run": {**card["run"], "objective": "SFT"}}
    assert f"next: weft generate {tmp_path}/best" in closing(tuned), "which needs a template"
    (tmp_path / "best").mkdir()
    (tmp_path / "best/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert f"next: weft chat {tmp_path}/best" in closing(tuned)
    assert f"next: weft generate {tmp_path}/best" in closing(card), "a model of text, whose tokenizer has a template"


def test_a_run_that_is_over_is_not_run_again_but_with_restart(host, finished):
    before = (host.folder / "done/last/trainer.json").stat().st_mtime_ns
    code, text = _said(host, "recipe.yaml", "out=done", "steps=4")
    assert code == 0
    assert "finished after 4 steps" in text
    assert (host.folder / "done/last/trainer.json").stat().st_mtime_ns == before
    code, text = _said(host, "recipe.yaml", "out=done", "steps=5")
    assert code == 2
    assert "done holds a run with steps = 4, but the recipe now says 5" in text
    code, text = _said(host, "recipe.yaml", "out=done", "steps=4", "--restart")
    assert code == 0
    assert (host.folder / "done/last/trainer.json").stat().st_mtime_ns > before


def test_trained_weights_can_be_trained_on(host, finished):
    code, text = _said(host, "recipe.yaml", "out=further", "steps=2", "model=done/best", "tokenizer=null")
    assert code == 0, text
    assert losses(host.folder / "further")[0][1] < losses(host.folder / "done")[0][1], "it begins where the other ended"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "there is no file missing.yaml"),
        (["recipe.yaml", "optm.lr=1"], "Did you mean 'optim'"),
        (["recipe.yaml", "steps=null"], "neither steps nor minutes is given"),
        (["recipe.yaml", "minutes=-1"], "minutes is -1"),
        (["recipe.yaml", "data=none.txt"], "there is no data at none.txt"),
        (["recipe.yaml", "data=latin.txt"], "latin.txt:1: the byte 0xe9 at column 4 is not UTF-8"),
        (["recipe.yaml", "data=empty.txt"], "the corpus is empty"),
        (["recipe.yaml", "out=thesis"], "thesis, which holds chapter.tex and is not a folder of an earlier run"),
        (["recipe.yaml", "eval.patience=2", "data=text.txt", "data={sources: [text.txt], valid: 0}"], "nothing is held out"),
        (["recipe.yaml", "device=cuda:7"], "device"),
        (
            ["recipe.yaml", "optim.lr=1.0e+30", "optim.clip=null", "optim.warmup=0", "model.dropout={}", "optim.name=adamw"],
            "so training stopped",
        ),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(host, arguments, message):
    (host.folder / "latin.txt").write_bytes("café".encode("latin-1") * 9)
    (host.folder / "empty.txt").write_bytes(b"")
    (host.folder / "thesis").mkdir(exist_ok=True)
    (host.folder / "thesis/chapter.tex").write_text("years of work")
    shutil.rmtree(host.folder / "run", ignore_errors=True)
    code, text = _said(host, *arguments)
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    if "stopped" in message:
        assert "The weights of step" in text
        assert json.loads((host.folder / "run/last/trainer.json").read_text())["state"]["finished"] is None
    else:
        assert text.startswith("weft: ")
        assert not (host.folder / "run").exists()
    assert [path.name for path in (host.folder / "thesis").iterdir()] == ["chapter.tex"]


def test_a_damaged_checkpoint_is_named(host):
    assert _said(host, "recipe.yaml", "out=hurt", "steps=2")[0] == 0
    path = host.folder / "hurt/last/optimizer/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, text = _said(host, "recipe.yaml", "out=hurt", "steps=2")
    assert code == 2
    assert "hurt/last cannot be resumed: hurt/last/optimizer/model.safetensors is cut short" in text


def test_the_hybrid_recipe_trains_every_kind_of_layer(host):
    code, text = _said(
        host, str(RECIPES / "hybrid.yaml"), "data.sources=[text.txt]", "tokenizer=tok", "out=hybrid", "steps=2", "batch.rows=2"
    )
    assert code == 0, text
    assert losses(host.folder / "hybrid")[1][1] < losses(host.folder / "hybrid")[0][1]
    config = json.loads((host.folder / "hybrid/last/config.json").read_text())
    assert config["model_type"] == "weft"
