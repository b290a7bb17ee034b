"""Learning rates as a pure function of the step: nothing to store, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear", "wsd", "constant"]
WARMUP_SHARE = 0.1
MOST_WARMUP = 100
PROBE_WARMUP = 20


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a shape.

    cosine    half a wave from 1 towards `final`, which the step after the last would have (Loshchilov and Hutter 2017).
    linear    straight from 1 towards `final`.
    wsd       constant, then straight towards `final` over the last `decay` share of the steps (Hu et al. 2024, MiniCPM).
    constant  1 throughout.

    warmup    steps over which the rate rises from 1/warmup, cut to the length of the run; None is a tenth of the steps, at most 100,
              and 20 while the number of steps is not known yet.
    """

    shape: Shape = "cosine"
    warmup: int | None = None
    final: float = 0.1
    decay: float = 0.2

    def factor(self, step: int, total: int | None, probe: int = 0) -> float:
        """Share of the peak learning rate at `step`, counted from 0, of `total` steps.

        total   None while a time budget has not become a number of steps; the rate then follows the warm-up.
        probe   steps that were run while it was None: they keep the rates they had.
        """
        if total is None or step < probe:
            warmup = PROBE_WARMUP if self.warmup is None else self.warmup
            return min(1.0, (step + 1) / warmup) if warmup else 1.0
        warmup = min(MOST_WARMUP, math.ceil(WARMUP_SHARE * total)) if self.warmup is None else min(self.warmup, total)
        if step < warmup:
            return (step + 1) / warmup
        if self.shape == "constant":
            return 1.0
        if self.shape == "wsd":
            length = max(1, round(self.decay * total))
            progress = max(0.0, (step - (total - length)) / length)
        else:
            progress = (step - warmup) / max(1, total - warmup)
        share = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.final + (1 - self.final) * share
