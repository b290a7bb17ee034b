"""What a check says: pass, fail or skipped, with the figure and its limit."""

import math
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    figure, limit  in `unit`; None where nothing was measured. A check passes where figure <= limit.
    detail         what was compared; of a failing one, where the two first differ; of a skipped one, why.
    """

    status: Status
    figure: float | None = None
    limit: float | None = None
    unit: str = ""
    detail: str = ""

    @classmethod
    def measured(cls, figure: float, limit: float, unit: str, detail: str) -> "Outcome":
        """Pass where figure <= limit; a figure that is no number fails."""
        return cls("pass" if figure <= limit else "fail", figure, limit, unit, detail)

    @classmethod
    def skipped(cls, why: str) -> "Outcome":
        return cls("skipped", detail=why)


@dataclass(frozen=True)
class Check:
    """An outcome with the name of its check and how long it took."""

    name: str
    outcome: Outcome
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: a figure that is infinite or not a number is null there, and the detail says so."""
        outcome = self.outcome
        figure = outcome.figure if outcome.figure is not None and math.isfinite(outcome.figure) else None
        return {
            "name": self.name,
            "status": outcome.status,
            "figure": figure,
            "limit": outcome.limit,
            "unit": outcome.unit,
            "detail": outcome.detail,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Report:
    """All checks of one model; `device` and `dtype` are what it ran on and in."""

    model: str
    device: str
    dtype: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; what was skipped was not proved."""
        return all(check.outcome.status != "fail" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [check.as_dict() for check in self.checks]
        return {"model": self.model, "device": self.device, "dtype": self.dtype, "passed": self.passed, "checks": checks}
