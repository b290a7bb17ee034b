"""The figures of a run that people follow: on its progress line, in its picture and at its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Watched:
    """One of them.

    name    its key in `metrics.jsonl`; of held-out data, behind `valid_`.
    label   what people call it, where that is not its name.
    unit    as an axis says it.
    style   how its value is written, as `format` takes it.
    rises   more of it is better: what is minimised on held-out data is this figure with its sign turned.
    """

    name: str
    label: str = ""
    unit: str = ""
    style: str = ".4f"
    rises: bool = False

    @property
    def title(self) -> str:
        return self.label or self.name

    def write(self, value: float) -> str:
        return format(value, self.style)

    def mean(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """Over those of the rows that have it, None where none has."""
        found = [row[self.name] for row in rows if row.get(self.name) is not None]
        return sum(found) / len(found) if found else None

    def best(self, loss: float) -> str:
        """The lowest held-out loss, said of this figure."""
        return f"{self.title} {self.write(0.0 - loss if self.rises else loss)}"


LOSS = Watched("loss", unit="nats a token")
ACCURACY = Watched("accuracy", style=".1%")
MEAN_REWARD = Watched("reward", rises=True)
DIVERGENCE = Watched("answer_kl", label="KL", unit="nats an answer", style=".2f")
