"""What is judged, and what a judge is."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from weft.data.record_kinds import Said
from weft.errors import UserError
from weft.spec.base import Spec


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and what it was asked.

    prompt    text or messages, as the record has it.
    text      without end tokens and without a stop string.
    finished  whether the model ended it; an answer cut off at the token limit is not.
    facts     the record's other columns, from which a judge may know what is right.
    origin    "file:row" of the record.
    """

    prompt: Said
    text: str
    finished: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    def fact(self, name: str, judge: str) -> Any:
        """A column of the record; raises UserError where it has none."""
        if name not in self.facts:
            found = ", ".join(self.facts) or "none"
            raise UserError(
                f"{self.origin}: the reward {judge} needs the column '{name}', and the record's other columns are: {found}. Add it."
            )
        return self.facts[name]


class Weighed(Spec):
    """What a recipe says of every reward.

    weight  factor of its number in the sum of all rewards.
    """

    weight: float = Field(default=1.0, allow_inf_nan=False)


class Reward(Weighed):
    """A judge with its settings."""

    @abstractmethod
    def judge(self, answer: Answer) -> float:
        """How good an answer is."""
