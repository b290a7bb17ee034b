"""What a user chooses. Importable without torch."""

import math
from dataclasses import dataclass
from pathlib import Path

from weft.device import DEVICES, DTYPES
from weft.errors import UserError, unknown

MOST_MINUTES = 7 * 24 * 60.0


@dataclass(frozen=True)
class Options:
    """Arguments of `weft quickstart`; raises UserError for one that makes no sense.

    out      the folder everything is written to.      corpus   the user's own text or code; None is the standard library.
    minutes  of pretraining, compilation apart.         seed     of initial weights, data order and samples; the split has none.
    """

    out: Path = Path("quickstart")
    corpus: Path | None = None
    minutes: float = 3.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minutes) and 0 < self.minutes <= MOST_MINUTES):
            raise UserError(f"minutes is {self.minutes:g}; give a time above 0 and at most {MOST_MINUTES:g}, such as 3.")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"the seed is {self.seed}; give a whole number from 0 to {2**31 - 1}.")
        if self.device.split(":")[0] not in DEVICES:
            raise unknown("device", self.device, DEVICES)
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise unknown("dtype", self.dtype, [name for name in DTYPES if name in ("auto", "float32", "bfloat16")])
