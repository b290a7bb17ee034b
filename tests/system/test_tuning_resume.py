"""SIGKILL in the middle of each kind of tuning, and of a chain: what goes on is bit for bit what would have been."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file
from train_runs import Host, losses, make_inputs, rows, wait_for_step

RECIPE: dict[str, Any] = {
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
    "batch": {"rows": 4, "length": 16},
    "eval": {"every": 5},
    "save": {"every": 2, "minutes": None},
    "log": {"every": 1, "plot": False},
    "dtype": "bfloat16",
}
ANSWERS = {"samples": 2, "max_tokens": 6, "unfinished": "keep"}
PPO = {
    "type": "ppo",
    "rewards": {"length": {"most": 4}},
    "critic": {"model": "policy"},
    "target": 0.02,
    "epochs": 1,
    "minibatches": 2,
    **ANSWERS,
}
KINDS: dict[str, tuple[str, Any]] = {
    "sft": ("talks", {"type": "sft", "neftune": 5}),
    "dpo": ("pairs", "dpo"),
    "reward": ("pairs", "reward"),
    "classify": ("texts", "classify"),
    "grpo": ("prompts", {"type": "grpo", "rewards": {"length": {"most": 4}}, **ANSWERS}),
    "ppo": ("prompts", PPO),
}
CHAIN = {
    "sft": {"data": "talks.jsonl", "objective": "sft", "steps": 3},
    "reward": {"data": "pairs.jsonl", "objective": "reward", "model": "$sft"},
    "ppo": {"data": "prompts.jsonl", "objective": {"type": "ppo", "reward": "$reward", **ANSWERS}, "model": "$sft", "steps": 3},
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    make_inputs(folder)
    numbers = range(20)
    records = {
        "prompts": [{"prompt": f"say {n}:"} for n in numbers],
        "talks": [{"prompt": f"say {n}:", "completion": f" {n}"} for n in numbers],
        "pairs": [{"prompt": f"say {n}:", "chosen": f" {n}", "rejected": " no"} for n in numbers],
        "texts": [{"text": f"say {n}", "label": "odd" if n % 2 else "even"} for n in numbers],
    }
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, (data, objective) in KINDS.items():
        recipe = {**RECIPE, "data": {"sources": [f"{data}.jsonl"], "valid": 0.2}, "objective": objective}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    common = {key: value for key, value in RECIPE.items() if key not in ("data", "eval")}
    (folder / "chain.yaml").write_text(yaml.safe_dump({**common, "chain": CHAIN}, sort_keys=False))
    host = Host(folder)
    yield host
    host.close()


def _kill(host: Host, kind: str, out: str, run: Path) -> int:
    """Start a command and kill it after a random step of the run in a folder, when it has saved one; returns the step."""
    step = random.randint(3, 7)
    pid = host.start("train", f"{kind}.yaml", f"out={out}")
    wait_for_step(run, step)
    os.kill(pid, signal.SIGKILL)
    assert host.wait() == -9, f"it was over before it was killed at {step}"
    return step


def _is_the_same(straight: Path, killed: Path, when: str) -> None:
    assert losses(straight) == losses(killed) != [], when
    assert rows(straight) == rows(killed), when
    files = sorted(path.relative_to(straight) for path in straight.glob("last/**/*.safetensors"))
    assert len(files) >= 2
    for file in files:
        assert (straight / file).read_bytes() == (killed / file).read_bytes(), f"{file}, {when}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_bit_for_bit(host, kind):
    straight, killed = host.folder / f"{kind}-straight", host.folder / f"{kind}-killed"
    assert host.run("train", f"{kind}.yaml", f"out={straight.name}") == 0, host.output()
    step = _kill(host, kind, killed.name, killed)
    assert host.run("train", f"{kind}.yaml", f"out={killed.name}") == 0, host.output()
    _is_the_same(straight, killed, f"killed at {step}")
    assert len({loss for _, loss in losses(straight)}) > 6, "control: no two steps are alike"
    if kind == "ppo":
        assert len(losses(straight)) == 24
        assert len({row["beta"] for row in rows(straight) if "beta" in row}) == 12
        policy, critic = (load_file(straight / "last" / name / "model.safetensors") for name in ("", "critic"))
        assert not (critic["model.embed_tokens.weight"] == policy["model.embed_tokens.weight"]).all()


def test_a_chain_that_is_killed_in_its_middle_run_goes_on_bit_for_bit(host):
    straight, killed = host.folder / "chain-straight", host.folder / "chain-killed"
    assert host.run("train", "chain.yaml", f"out={straight.name}") == 0, host.output()
    step = _kill(host, "chain", killed.name, killed / "2-reward")
    assert not (killed / "3-ppo").exists()
    assert host.run("train", "chain.yaml", f"out={killed.name}") == 0, host.output()
    for run in ("1-sft", "2-reward", "3-ppo"):
        _is_the_same(straight / run, killed / run, f"killed at {step}")


def test_two_processes_write_the_answers_of_one(host):
    grpo = [
        "dtype=float64",
        "steps=4",
        "save.every=null",
        "objective={type: grpo, rewards: {length: {most: 4}}, samples: 3, max_tokens: 6}",
    ]
    assert host.run("train", "grpo.yaml", *grpo, "objective.unfinished=keep", "out=one") == 0, host.output()
    assert host.run("train", "grpo.yaml", *grpo, "objective.unfinished=keep", "out=two", processes=2) == 0, host.output()
    one, two = (rows(host.folder / name) for name in ("one", "two"))
    assert len(one) == len(two) > 4
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, abs=1e-9)
    assert one[-1] != pytest.approx(one[0], abs=1e-3)
