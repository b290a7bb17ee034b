"""A finished step is not repeated, a changed one is, and a failed one leaves no record."""

import pytest

from weft.quickstart.ledger import Ledger, content_key


def test_a_step_runs_once_for_a_key(tmp_path):
    ledger, calls, output = Ledger(tmp_path), [], tmp_path / "out.txt"

    def work():
        calls.append(1)
        output.write_text("x")
        return {"value": len(calls)}

    first, known = ledger.run("step", content_key(1), work, [output])
    assert not known
    again, known = ledger.run("step", content_key(1), work, [output])
    assert known
    assert again == first
    assert again["seconds"] >= 0
    assert ledger.run("step", content_key(2), work, [output])[0]["value"] == 2
    output.unlink()
    assert ledger.run("step", content_key(2), work, [output])[0]["value"] == 3


def test_a_failed_step_is_not_recorded(tmp_path):
    ledger = Ledger(tmp_path)

    def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.run("step", "key", work)
    assert ledger.find("step", "key") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": "key"}', b"\xff"])
def test_a_damaged_record_counts_as_none(tmp_path, content):
    (tmp_path / "step.json").write_bytes(content)
    assert Ledger(tmp_path).find("step", "key") is None


def test_keys_follow_every_fact():
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert len({content_key(), content_key(1), content_key("1"), content_key(1, 2), content_key([1, 2])}) == 5
