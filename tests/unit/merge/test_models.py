"""Whole models merged through their files: streamed is what it would be in memory, and what does not go together is refused."""

import json
import subprocess
import sys

import pytest
import torch

from weft.errors import UserError
from weft.merge import combine
from weft.merge.models import Models, agree, average, first_difference, interpolate
from weft.nn import build
from weft.spec import model_spec
from weft.weights.load import load_model
from weft.weights.map import stored_state, stored_tensors
from weft.weights.save import save_model
from weft.zoo import rules_of
from weft.zoo.llama import LLAMA

SPEC = {
    "vocab": 50,
    "dim": 32,
    "context": 64,
    "norm": {"type": "rms"},
    "layers": [
        {"repeat": 2, "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 48}}
    ],
}
HYBRID = {**SPEC, "layers": [*SPEC["layers"], {"mixer": {"type": "mamba", "state_dim": 4}}, {"mixer": {"type": "lstm"}}]}


def saved(folder, count=3, spec=SPEC, dtype=torch.float32):
    return [save_model(build(model_spec(spec), seed=seed, dtype=dtype), folder / f"m{seed}") for seed in range(count)]


def pieces(path):
    """A model's tensors by the names that Hugging Face has for them."""
    model = load_model(path, dtype=torch.float64).model
    return dict(stored_tensors(stored_state(model), rules_of(LLAMA, model.spec)))


@pytest.mark.parametrize("spec", [SPEC, HYBRID], ids=["llama", "hybrid"])
def test_a_mean_is_the_mean_of_all_weights(tmp_path, spec):
    paths = saved(tmp_path, spec=spec)
    merged = average(Models(paths), [1, 2, 1], tmp_path / "out")
    got = stored_state(load_model(tmp_path / "out", dtype=torch.float64).model)
    given = [stored_state(load_model(path, dtype=torch.float64).model) for path in paths]
    for name, tensor in got.items():
        want = sum(share * state[name] for share, state in zip((0.25, 0.5, 0.25), given, strict=True))
        torch.testing.assert_close(tensor, want, rtol=2e-7, atol=1e-7)
    assert merged.distances[1] < merged.distances[0]
    total = sum(state.square().sum() for state in given[1].values())
    off = sum((got[name] - given[1][name]).square().sum() for name in got)
    assert merged.distances[1] == pytest.approx(float((off / total).sqrt()), rel=1e-4)
    assert (got["embed.weight"] - given[0]["embed.weight"]).abs().max() > 1e-3, "control"


def test_slerp_and_ties_see_tensors_as_files_have_them(tmp_path):
    paths = saved(tmp_path)
    given = [pieces(path) for path in paths]
    interpolate(Models(paths[:2]), 0.3, tmp_path / "slerp")
    for name, tensor in pieces(tmp_path / "slerp").items():
        torch.testing.assert_close(tensor, combine.slerp(given[0][name], given[1][name], 0.3), rtol=0, atol=1e-6)
    q, k = (f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qk")
    fused = combine.slerp(torch.cat([given[0][q], given[0][k]]), torch.cat([given[1][q], given[1][k]]), 0.3)
    assert (fused[: len(given[0][q])] - pieces(tmp_path / "slerp")[q]).abs().max() > 1e-6, "control: fused tensors turn by another angle"

    agree(Models(paths), 0.3, 0.8, (), tmp_path / "ties")
    changes = [[given[i][name] - given[0][name] for name in given[0]] for i in (1, 2)]
    thresholds = [combine.magnitude(lambda each=each: each, 0.3) for each in changes]
    for name, tensor in pieces(tmp_path / "ties").items():
        want = combine.ties(given[0][name], [given[1][name], given[2][name]], thresholds, (1, 1), 0.8)
        torch.testing.assert_close(tensor, want, rtol=0, atol=1e-6)


def test_dtypes_and_other_files_are_kept(tmp_path):
    paths = saved(tmp_path, 2, dtype=torch.bfloat16)
    assert average(Models(paths), [1, 1], tmp_path / "out").dtype == "bfloat16"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((paths[0] / "config.json").read_text())
    assert average(Models(paths), [1, 1], tmp_path / "wide", dtype=torch.float32).dtype == "float32"
    assert load_model(tmp_path / "wide").model.dtype == torch.float32


def test_models_that_do_not_go_together_are_refused(tmp_path):
    paths = saved(tmp_path, 1)
    for name, change, words in (
        ("wide", {"dim": 64}, "dim is 32 in the one and 64"),
        ("deep", {"layers": [{**SPEC["layers"][0], "repeat": 3}]}, "the number of layers is 2 in the one and 3"),
        (
            "base",
            {"layers": [{**SPEC["layers"][0], "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {"base": 5e5}}}]},
            "rope.base",
        ),
    ):
        other = save_model(build(model_spec({**SPEC, **change}), seed=0), tmp_path / name)
        with pytest.raises(UserError, match=words):
            Models([*paths, other])
    small = save_model(build(model_spec({**SPEC, "quant": {"type": "int8"}}), seed=0), tmp_path / "small")
    with pytest.raises(UserError, match="is quantised to int8"):
        Models([small, small])
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None


def test_a_damaged_model_leaves_nothing_behind(tmp_path):
    model = build(model_spec(SPEC), seed=0)
    with torch.no_grad():
        model.blocks[1].channel.down.weight[3, 3] = float("nan")
    paths = [*saved(tmp_path, 1), save_model(model, tmp_path / "broken")]
    with pytest.raises(UserError, match=r"down.weight is not finite"):
        average(Models(paths), [1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda models, out: average(models, [1], out), "1 weights are given for 2 models"),
        (lambda models, out: average(models, [1, -1], out), "sum must be above 0"),
        (lambda models, out: interpolate(models, 1.5, out), "t is 1.5"),
        (lambda models, out: agree(models, 0.0, 1.0, (), out), "density is 0"),
        (lambda models, out: agree(models, 0.2, 1.0, (1, 1), out), "2 weights are given for 1 models"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, call, words):
    with pytest.raises(UserError, match=words):
        call(Models(saved(tmp_path, 2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def weft(*arguments):
    return subprocess.run([sys.executable, "-m", "weft.cli.main", *map(str, arguments)], capture_output=True, text=True)


def test_the_verb_averages_the_snapshots_of_a_run(tmp_path):
    (tmp_path / "run/snapshots").mkdir(parents=True)
    for step, path in zip((100, 20, 9), saved(tmp_path), strict=True):
        path.rename(tmp_path / f"run/snapshots/step-{step}")
    made = weft("merge", "average", tmp_path / "run", "--last", "2", "--decay", "0.5", "-o", tmp_path / "out", "--json")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout.splitlines()[-1])
    assert [path.rsplit("-", 1)[1] for path in told["models"]] == ["20", "100"]
    given = [load_model(tmp_path / f"run/snapshots/step-{step}").model.embed.weight for step in (20, 100)]
    got = load_model(tmp_path / "out").model.embed.weight
    torch.testing.assert_close(got, (given[0] + 2 * given[1]) / 3, rtol=0, atol=1e-7)
    for arguments, words in (
        (("average", tmp_path / "run", "--last", "4"), "--last is 4, but there are 3"),
        (("linear", tmp_path / "out", tmp_path / "out", "--weights", "a,b"), "--weights is 'a,b'"),
        (("slerp", tmp_path / "out", tmp_path / "out", "--dtype", "q8_0"), "q8_0"),
    ):
        refused = weft("merge", *arguments, "-o", tmp_path / "no")
        assert (refused.returncode, (tmp_path / "no").exists()) == (2, False)
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
