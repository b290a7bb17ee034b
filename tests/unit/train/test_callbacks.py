"""What watchers print and write."""

import importlib.util
import io

import pytest

from weft.errors import UserError
from weft.machine import matmul_peak
from weft.train.callbacks import ProgressLine, TensorBoard, clock
from weft.train.card import size
from weft.train.plot import plot_loss
from weft.train.speed import Pace, Stopwatch

ROWS = [{"step": step, "loss": 3.0 - step / 100, "lr": 0.1} for step in range(1, 5)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_is_written_over_and_a_file_gets_lines():
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
        assert plot_loss(drawn, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


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
