"""How long a run is: a number of steps, or minutes that are turned into one as soon as the pace is known."""

import math
from statistics import fmean

from weft.errors import UserError

SETTLE = 3  # first steps that are not timed: compilation, caches, memory
TIMED = 7  # steps that are timed, fewer where they would take more than `PATIENCE` of the budget
PATIENCE = 0.05
EVALUATIONS = 10  # of a run that does not say how many
EVALUATING = 0.1  # the most of a time budget that they may take


class Budget:
    """Minutes as a number of steps.

    The first steps of a run are timed, those that compile left out. Then the number of steps is fixed once and for all and stored,
    so that the schedule, and with it every later step, is the same however often the run is interrupted.
    """

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise UserError(f"minutes is {minutes}; a time budget must be above 0.")
        self.seconds = minutes * 60
        self._times: list[float] = []

    def observe(self, seconds: float) -> bool:
        """Take the time of one more step; True when enough are known."""
        self._times.append(seconds)
        timed = self._times[SETTLE:]
        return len(timed) >= TIMED or (len(timed) >= 2 and sum(timed) >= PATIENCE * self.seconds)

    @property
    def step_seconds(self) -> float:
        return fmean(self._times[SETTLE:])  # not the median: a budget pays for the slow steps too

    def fix(self, evaluation: float = 0.0, every: int | None = None) -> tuple[int, int]:
        """The number of steps that fit, at least as many as were observed, and the steps between two evaluations.

        evaluation  seconds that one evaluation takes; the budget pays for them.
        every       steps between two; None has ten, or as few as take no more than `EVALUATING` of the budget.
        """
        least = len(self._times)
        if every is not None:
            return max(least, math.floor(self.seconds / (self.step_seconds + evaluation / every) + 1e-9)), every
        affordable = EVALUATING * self.seconds / evaluation if evaluation else EVALUATIONS
        evaluations = int(min(EVALUATIONS, max(1, affordable)))
        total = max(least, math.floor((self.seconds - evaluations * evaluation) / self.step_seconds + 1e-9))
        return total, evaluate_every(total, evaluations)


def evaluate_every(total: int, evaluations: int = EVALUATIONS) -> int:
    """Steps between two evaluations of a run of `total` steps that has so many of them."""
    return max(1, -(-total // evaluations))
