"""What an answer looks like."""

import re

from pydantic import Field, PositiveInt, field_validator

from weft.rewards.reward import Answer, Reward


class Match(Reward):
    """1 where the answer, without the space around it, is the record's column `field`; else 0."""

    field: str = "answer"

    def judge(self, answer: Answer) -> float:
        return float(answer.text.strip() == answer.said(self.field, "match").strip())


class Format(Reward):
    """1 where the whole answer matches a regular expression, whose dot matches line ends too; else 0."""

    pattern: str = Field(default=...)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} is no regular expression ({error}); correct it.") from None
        return pattern

    def judge(self, answer: Answer) -> float:
        return float(re.fullmatch(self.pattern, answer.text.strip(), re.DOTALL) is not None)


class Length(Reward):
    """1 up to `most` characters, falling evenly to 0 at twice as many."""

    most: PositiveInt = Field(default=...)

    def judge(self, answer: Answer) -> float:
        return min(1.0, max(0.0, 2 - len(answer.text) / self.most))
