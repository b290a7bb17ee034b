"""SIGKILL in the middle of PPO: answers, critic and the price of divergence are what they would have been."""

import json
import os
import signal

import pytest
import yaml
from safetensors.numpy import load_file
from train_runs import Host, losses, make_inputs, rows, wait_for_step

RECIPE = {
    "model": {
        "dim": 16,
        "context": 24,
        "norm": {"type": "rms"},
        "layers": [{"mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 24}}],
    },
    "data": {"sources": ["prompts.jsonl"], "valid": 0.2},
    "tokenizer": "tok",
    "out": "run",
    "steps": 12,
    "objective": {
        "type": "ppo",
        "rewards": {"length": {"most": 4}},
        "critic": {"model": "policy"},
        "samples": 2,
        "max_tokens": 6,
        "unfinished": "keep",
        "target": 0.02,
        "epochs": 1,
        "minibatches": 2,
    },
    "batch": {"rows": 4, "length": 16},
    "eval": {"every": 5},
    "save": {"every": 3, "minutes": None},
    "log": {"every": 1, "plot": False},
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    make_inputs(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {number}:"}) + "\n" for number in range(20)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    host = Host(folder)
    yield host
    host.close()


def test_a_killed_run_goes_on_bit_for_bit(host):
    assert host.run("train", "recipe.yaml", "out=straight") == 0, host.output()
    straight, killed = host.folder / "straight", host.folder / "killed"
    for step in (4, 8):
        pid = host.start("train", "recipe.yaml", "out=killed")
        wait_for_step(killed, step)
        os.kill(pid, signal.SIGKILL)
        assert host.wait() == -9
    assert host.run("train", "recipe.yaml", "out=killed") == 0, host.output()
    assert rows(killed) == rows(straight)
    assert len(losses(straight)) == 24
    assert len({row["beta"] for row in rows(straight) if "beta" in row}) == 12
    for name in ("model.safetensors", "critic/model.safetensors"):
        one, other = (load_file(out / "last" / name) for out in (straight, killed))
        assert all((one[key] == other[key]).all() for key in one)
    assert not (one["model.embed_tokens.weight"] == load_file(straight / "last/model.safetensors")["model.embed_tokens.weight"]).all()


def test_two_processes_write_the_answers_of_one(host):
    grpo = [
        "dtype=float64",
        "steps=4",
        "save.every=null",
        "objective={type: grpo, rewards: {length: {most: 4}}, samples: 3, max_tokens: 6}",
    ]
    assert host.run("train", "recipe.yaml", *grpo, "objective.unfinished=keep", "out=one") == 0, host.output()
    assert host.run("train", "recipe.yaml", *grpo, "objective.unfinished=keep", "out=two", processes=2) == 0, host.output()
    one, two = (rows(host.folder / name) for name in ("one", "two"))
    assert len(one) == len(two) > 4
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, abs=1e-9)
    assert one[-1] != pytest.approx(one[0], abs=1e-3)
