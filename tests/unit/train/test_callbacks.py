"""What watchers print and write."""

import importlib.util
import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from unittest import mock

import pytest

from weft.errors import UserError
from weft.machine import matmul_peak
from weft.objectives.ppo import PPO
from weft.objectives.reward import Reward
from weft.train.callbacks import ProgressLine, TensorBoard, clock
from weft.train.card import size
from weft.train.history import Row
from weft.train.plot import plot_run
from weft.train.speed import Pace, Stopwatch
from weft.train.watched import LOSS, Watched

ROWS = [{"step": step, "loss": 3.0 - step / 100, "lr": 0.1} for step in range(1, 5)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_is_written_over_and_a_file_gets_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    pace = Pace(4, 100, 1234.5, 0.256, 75.0)
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        line = ProgressLine(stream)
        line.on_evaluate({"step": 3, "valid_loss": 2.5, "valid_bits_per_byte": 1.25})
        line.on_log(ROWS, pace)
        line.on_log(ROWS, pace)
        line.on_end({})
    text = "step 4/100  loss 2.9750  held-out 2.5000 (1.250 bits/byte)  1,234 tok/s  MFU 26%  1:15 left"
    assert terminal.getvalue() == f"\r\x1b[K{text}\r\x1b[K{text}\n"
    assert file.getvalue() == f"{text}\n", "not more than one in ten seconds"


def shown(watched: Sequence[Watched], held_out: Row, row: Row, columns: int = 200) -> str:
    """What a terminal of so many columns shows last."""
    stream = Terminal()
    line = ProgressLine(stream)
    card = {"model": {"parameters": 1}, "run": {"steps": 9, "minutes": None, "resumed_from": 0, "tokens_per_step": 1, "device": "cpu"}}
    line.on_start({**card, "watched": [asdict(each) for each in watched]})
    with mock.patch("shutil.get_terminal_size", return_value=os.terminal_size((columns, 24))):
        line.on_log([row], Pace(4, 9, 1234.5, 0.256, 75.0))
        line.on_evaluate(held_out)
    return stream.getvalue().split("\x1b[K")[-1]


def test_the_line_shows_what_the_objective_has_watched():
    pair = shown(Reward.watched, {"step": 4, "valid_loss": 0.5, "valid_accuracy": 0.625}, {"step": 4, "loss": 0.6, "accuracy": 1.0})
    assert pair == "step 4/9  loss 0.6000  held-out 0.5000 (accuracy 62.5%)  1,234 tok/s  MFU 26%  1:15 left"
    row = {"step": 4, "loss": -0.01, "reward": 0.25, "answer_kl": 1.5}
    answers = shown(PPO.watched, {"step": 4, "valid_loss": -0.5, "valid_reward": 0.5}, row)
    assert answers == "step 4/9  reward 0.2500  KL 1.50  held-out 0.5000  1,234 tok/s  MFU 26%  1:15 left"
    assert "KL" not in shown(PPO.watched, {"step": 4, "valid_reward": 0.5}, {"step": 4, "loss": 0.0, "reward": 0.25})
    assert PPO.watched[0].best(-0.5) == "reward 0.5000"
    assert PPO.watched[0].best(0.0) == "reward 0.0000"
    assert Reward.watched[0].best(0.5) == "loss 0.5000"


def test_a_narrow_terminal_is_never_wrapped():
    held_out = {"step": 4, "valid_loss": 2.5, "valid_bits_per_byte": 1.25}
    for columns in (200, 84, 80, 60, 40):
        text = shown([LOSS], held_out, ROWS[-1], columns)
        assert len(text) < columns
        assert text.startswith("step 4/9  loss 2.9600")
        assert text.endswith("  1:15 left")


def test_before_the_pace_is_known_it_says_so():
    stream = io.StringIO()
    ProgressLine(stream).on_log(ROWS, Pace(4, None, 10.0, 0.1, None))
    assert stream.getvalue().startswith("step 4  loss")
    assert "measuring the pace" in stream.getvalue()


def test_times_and_sizes():
    assert [clock(seconds) for seconds in (0, 59.4, 61, 3725)] == ["0s", "59s", "1:01", "1:02:05"]
    assert [size(count) for count in (5, 1500, 2.5e9, 4e13)] == ["5 B", "1.5 kB", "2.5 GB", "40.0 TB"]


def test_a_picture_of_a_long_run_and_of_none(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": step, "loss": 1.0} for step in range(5000)] + [{"step": 9, "valid_loss": 2.0}]
    for name, drawn in (("long.png", rows), ("none.png", [])):
        assert plot_run(drawn, [LOSS], tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_picture_has_a_place_for_every_figure_that_a_run_has(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rows = [{"step": step, "loss": 0.1, "reward": 1.0, "answer_kl": None if step < 3 else 2.0} for step in range(5)]
    widths = {}
    for name, drawn in (("both", rows), ("reward", [{**row, "answer_kl": None} for row in rows])):
        assert plot_run(drawn, PPO.watched, tmp_path / f"{name}.png")
        widths[name] = image.imread(tmp_path / f"{name}.png").shape[1]
    assert widths == {"both": 1200, "reward": 840}


def test_tensorboard_writes_scalars_or_says_what_is_missing(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UserError, match=r"needs tensorboard.*weft\[tensorboard\]"):
            TensorBoard(tmp_path)
        return
    board = TensorBoard(tmp_path)
    board.on_log(ROWS, Pace(4, None, 10.0, 0.1, None))
    board.on_end({})
    assert any(path.name.startswith("events") for path in tmp_path.iterdir())


def test_a_stopwatch_counts_only_while_it_runs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    watch.start()
    now[0] = 2.0
    watch.stop()
    now[0] = 10.0
    watch.start()
    now[0] = 11.0
    assert watch.lap() == 3.0
    now[0] = 11.5
    assert watch.lap() == 0.5


def test_the_peak_is_a_speed():
    import torch

    assert matmul_peak(torch.device("cpu"), torch.float32) > 1e7
