"""Training tests do not wait for an exact measure of the machine."""

import pytest

from weft.train import speed


@pytest.fixture(autouse=True)
def _quick_measure(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setitem(speed.SIZES, "cpu", 128)
