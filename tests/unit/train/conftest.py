"""Training tests do not wait for an exact measure of the machine."""

import pytest

from weft import machine


@pytest.fixture(autouse=True)
def _quick_measure(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    monkeypatch.setitem(machine.SIZES, "cpu", 128)
