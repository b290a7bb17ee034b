"""SIGKILL at random steps: what is resumed is bit for bit what would have been, weights and loss column."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from train_runs import Host, losses, make_inputs, rows, wait_for_step


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    make_inputs(folder)
    host = Host(folder)
    yield host
    host.close()


@pytest.fixture(scope="module")
def straight(host):
    """The folder of a run that nothing interrupted."""
    assert host.run("train", "recipe.yaml", "out=straight") == 0, host.output()
    return host.folder / "straight"


def _same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(out / "last" / "model.safetensors") for out in (one, other))
    return all((first[name] == second[name]).all() for name in first) and first.keys() == second.keys()


def _kill_at(host: Host, out: Path, step: int, *arguments: str) -> None:
    pid = host.start("train", "recipe.yaml", f"out={out.name}", *arguments)
    wait_for_step(out, step)
    os.kill(pid, signal.SIGKILL)
    assert host.wait() == -9


def test_a_run_killed_at_five_random_steps_is_the_run_that_was_not(host, straight):
    killed = host.folder / "killed"
    steps = sorted(random.Random(os.getpid()).sample(range(1, 38), 5))
    for step in steps:
        _kill_at(host, killed, step)
    assert host.run("train", "recipe.yaml", "out=killed") == 0, host.output()
    assert len(losses(straight)) == 40
    assert losses(killed) == losses(straight), f"killed at {steps}"
    assert rows(killed) == rows(straight)
    assert _same_weights(straight, killed), f"killed at {steps}"
    assert (killed / "last/optimizer/model.safetensors").read_bytes() == (straight / "last/optimizer/model.safetensors").read_bytes()
    # Negative control: another seed is another run.
    assert host.run("train", "recipe.yaml", "out=other", "seed=1", "steps=10") == 0
    assert losses(host.folder / "other") != losses(straight)[:10]
    assert not _same_weights(straight, host.folder / "other")


def test_a_time_budget_survives_kills_with_the_number_of_steps_it_fixed(host):
    killed, counted = host.folder / "timed", host.folder / "counted"
    # Before the pace is known: the run begins again.
    budget = "minutes=0.05"
    _kill_at(host, killed, 2, budget)
    assert json.loads((killed / "last/trainer.json").read_text())["state"]["total"] is None
    for step in (11, 14):
        _kill_at(host, killed, step, budget)
    fixed = json.loads((killed / "last/trainer.json").read_text())["state"]["total"]
    assert host.run("train", "recipe.yaml", "out=timed", budget) == 0, host.output()
    assert len(losses(killed)) == fixed
    assert host.run("train", "recipe.yaml", "out=counted", f"steps={fixed}") == 0, host.output()
    assert losses(killed) == losses(counted)
    assert _same_weights(killed, counted)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(host, straight):
    out = host.folder / "interrupted"
    pid = host.start("train", "recipe.yaml", "out=interrupted")
    wait_for_step(out, 5)
    os.kill(pid, signal.SIGINT)
    assert host.wait() == 130
    assert "which is saved in interrupted/last. Run the same command to go on." in host.output()
    saved = json.loads((out / "last/trainer.json").read_text())["state"]["step"]
    assert saved == losses(out)[-1][0] >= 5
    assert host.run("train", "recipe.yaml", "out=interrupted") == 0
    assert losses(out) == losses(straight) != []
