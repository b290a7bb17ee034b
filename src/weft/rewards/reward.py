"""What is judged, and what a judge is."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from pydantic import Field

from weft.data.record_kinds import Said
from weft.data.rows import KINDS
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

    def said(self, name: str, judge: str) -> str:
        """A column that says how an answer should be: text, a number as people write it (4 for 4.0), or what one assistant message says.

        Raises UserError for anything else, which no answer could be like.
        """
        value = self.fact(name, judge)
        if isinstance(value, list | tuple):
            value = value[0] if len(value) == 1 and isinstance(value[0], Mapping) else list(value)
        if isinstance(value, Mapping) and value.get("role") == "assistant":
            value = value.get("content")
        if isinstance(value, str):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        kind = KINDS.get(type(value), type(value).__name__)
        raise UserError(
            f"{self.origin}: the reward {judge} compares with the column '{name}', which is {kind}; give text, a finite number, or one "
            "assistant message."
        )


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
