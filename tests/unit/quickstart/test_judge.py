"""Judging samples: parsed, cut at the margin, with an interval."""

import pytest

from weft.quickstart.judge import ParseShare, is_function, judge, wilson
from weft.rewards.python import take_body

PROMPT = 'def f(x):\n    """Double it."""'


@pytest.mark.parametrize(
    "body", ["    return 2 * x\n", "    return 2 * x", "    # why\n    y = x\n\n    return y\n", "    def g():\n        pass\n"]
)
def test_functions_are_accepted(body):
    assert is_function(PROMPT, "\n" + body)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n",
        "    # only a comment\n",
        "    return (\n",
        "  return x\n",
        "    return x\n      y\n",
        "return x\n",
        "    if x:\n",
        "    '''open\n",
        "\0",
    ],
)
def test_others_are_not(body):
    assert not is_function(PROMPT, "\n" + body)
    assert not is_function(PROMPT, body)


def test_the_body_ends_at_the_left_margin():
    assert take_body("\n    return 1\n\n\ndef g():\n    pass\n") == ("\n    return 1\n\n\n", True)
    assert take_body("\n    return 1\n    y") == ("\n    return 1\n    y", False)
    assert take_body("\nreturn 1\n") == ("\n", True)
    assert take_body("[0]\n    return 1") == ("[0]\n    return 1", False)
    assert take_body("") == ("", False)


def test_counts():
    share = judge([PROMPT] * 4, ["\n    return x\ndef g(:\n", "\n    return (", "\n    return x", ""], [False, False, True, True])
    assert share == ParseShare(accepted=2, finished=3, samples=4, acting=0, parameters=2, used=2, lines=2)
    assert share.share == 0.5
    low, high = share.bounds
    assert 0 < low < 0.5 < high < 1


def test_wilson_interval():
    # Newcombe (1998), table I, method 3: 81 of 263 and 15 of 148, 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(81, 263) != pytest.approx((0.2523, 0.3637), abs=5e-4)  # the simple interval


def test_nothing_is_run(tmp_path):
    target = tmp_path / "made"
    body = f"\n    return open({str(target)!r}, 'w')\n"
    assert is_function(PROMPT.replace("x)", f"x=open({str(target)!r}, 'w'))"), body)
    assert not target.exists()
