"""Learning rates as a function of the step, and minutes as a number of steps."""

import math

import pytest

from weft.errors import UserError
from weft.train.budget import SETTLE, TIMED, Budget
from weft.train.schedule import Schedule


def test_cosine_goes_from_the_peak_to_the_final_share():
    factors = [Schedule("cosine", 10, 0.1).factor(step, 110) for step in range(110)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert 0.1 < factors[-1] < 0.102


def test_linear_and_wsd_and_constant():
    linear = [Schedule("linear", 0, 0.0).factor(step, 100) for step in range(100)]
    assert linear == pytest.approx([1 - step / 100 for step in range(100)])
    wsd = [Schedule("wsd", 5, 0.0, decay=0.25).factor(step, 100) for step in range(100)]
    assert wsd[5:76] == [1.0] * 71
    assert wsd[80] == pytest.approx(1 - 5 / 25)
    assert wsd[-1] == pytest.approx(1 / 25)
    assert [Schedule("constant", 2).factor(step, 10) for step in range(5)] == [0.5, 1, 1, 1, 1]


def test_warmup_left_out_is_a_tenth_at_most_a_hundred():
    assert Schedule().factor(0, 50) == pytest.approx(1 / 5)
    assert Schedule().factor(0, 100_000) == pytest.approx(1 / 100)


def test_before_the_length_is_known_the_rate_only_warms_up_and_what_was_run_keeps_its_rate():
    schedule = Schedule("cosine", 20)
    early = [schedule.factor(step, None) for step in range(10)]
    assert early == pytest.approx([(step + 1) / 20 for step in range(10)])
    assert [schedule.factor(step, 1000, probe=10) for step in range(10)] == early
    assert schedule.factor(10, 1000, probe=10) == schedule.factor(10, 1000), "with a given warm-up a budget changes nothing"
    assert Schedule("constant", 0).factor(0, None) == 1.0


def test_a_budget_becomes_steps_once_enough_are_timed_and_the_first_ones_do_not_count():
    budget = Budget(1.0)
    answers = [budget.observe(30.0 if step < SETTLE else 0.1) for step in range(SETTLE + TIMED)]
    assert answers == [False] * (SETTLE + TIMED - 1) + [True]
    assert budget.fix() == (600, 60)
    slow = Budget(1.0)
    assert [slow.observe(seconds) for seconds in (9, 9, 9, 8.0, 8.0)][-1], "slow steps are not timed for long"
    assert slow.fix() == (7, 1)
    assert math.isclose(slow.step_seconds, 8.0)


def test_a_budget_is_never_less_than_what_was_run():
    budget = Budget(0.001)
    while not budget.observe(1.0):
        pass
    assert budget.fix()[0] == SETTLE + 2


def test_evaluations_are_paid_for_by_the_budget_and_take_no_more_than_a_tenth_of_it():
    budget = Budget(1.0)
    while not budget.observe(0.1):
        pass
    assert budget.fix(evaluation=0.3) == (570, 57)
    assert budget.fix(evaluation=3.0) == (540, 270), "two are all that a tenth pays for"
    assert budget.fix(evaluation=20.0) == (400, 400), "one there is, whatever it takes"
    assert budget.fix(evaluation=5.0, every=50) == (300, 50)
    assert budget.fix(evaluation=90.0) == (SETTLE + TIMED, SETTLE + TIMED)


def test_a_negative_budget_is_refused():
    with pytest.raises(UserError, match="minutes is -1"):
        Budget(-1)
    with pytest.raises(UserError, match="above 0"):
        Budget(math.nan)
