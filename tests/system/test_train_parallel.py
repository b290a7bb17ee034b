"""Several processes train the same model as one does, and go on after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from train_runs import Host, losses, make_inputs, rows, wait_for_step

SAME = ["dtype=float64", "steps=8", "model.dropout={}", "batch.micro=null", "optim.name=adamw"]
UNREAD = ["model.mtp.depth=1", "objective.mtp=0"]  # modules without a gradient, which must not shrink where there are two processes


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    make_inputs(folder)
    host = Host(folder)
    yield host
    host.close()


def _weights(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "last" / "model.safetensors")


def test_two_processes_equal_one(host):
    assert host.run("train", "recipe.yaml", *SAME, *UNREAD, "out=one") == 0, host.output()
    told = host.output().count("parameters, ")
    assert host.run("train", "recipe.yaml", *SAME, *UNREAD, "out=two", processes=2) == 0, host.output()
    assert host.output().count("parameters, ") == told + 1, "only one of them speaks"
    one, two = host.folder / "one", host.folder / "two"
    for (step, alone), (same, together) in zip(losses(one), losses(two), strict=True):
        assert step == same
        assert together == pytest.approx(alone, abs=1e-11)
    held_out = [[row["valid_loss"] for row in rows(out) if "valid_loss" in row] for out in (one, two)]
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-11)
    expected, found = _weights(one), _weights(two)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-9)
    # Negative control: half of each batch, which is what one process alone sees, is another training run.
    assert host.run("train", "recipe.yaml", *SAME, *UNREAD, "out=half", "batch.rows=3") == 0
    half = _weights(host.folder / "half")
    assert max(np.abs(half[name] - values).max() for name, values in expected.items()) > 1e-4


def test_ranks_that_drop_out_differently_resume_exactly(host):
    """Each rank draws its own dropout, so each one's random numbers are in the checkpoint."""
    both = ["steps=14", "save.every=3"]
    assert host.run("train", "recipe.yaml", *both, "out=straight", processes=2) == 0, host.output()
    first = host.start("train", "recipe.yaml", *both, "out=killed", processes=2)
    wait_for_step(host.folder / "killed", 8)
    os.kill(first, signal.SIGKILL)
    assert host.wait() != 0
    assert host.run("train", "recipe.yaml", *both, "out=killed", processes=2) == 0, host.output()
    assert losses(host.folder / "killed") == losses(host.folder / "straight")
    straight, killed = _weights(host.folder / "straight"), _weights(host.folder / "killed")
    assert all((straight[name] == killed[name]).all() for name in straight)


def test_a_batch_that_cannot_be_shared_is_refused(host):
    assert host.run("train", "recipe.yaml", *SAME, "out=odd", "batch.rows=5", processes=2) != 0
    assert "the batch is 5 rows for 2 ranks; it must be a multiple" in host.output()
    assert not (host.folder / "odd").exists()


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    make_inputs(tmp_path)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "weft.cli.main", "train", "recipe.yaml", *SAME]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *launch], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(losses(tmp_path / "run")) == 8
