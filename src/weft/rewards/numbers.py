"""Whether an answer ends in the right number."""

import re
from decimal import Decimal, InvalidOperation

from weft.errors import UserError
from weft.rewards.reward import Answer, Reward

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?\d[\d,]*(?:\.\d+)?")  # what follows a digit or a name is taken away, not negative
_MARK, _BOX = "####", re.compile(r"\\boxed\{([^{}]*)\}")


class GSM8K(Reward):
    """1 where the answer's final number equals that of the record's `answer`, which ends in `#### 72` (Cobbe et al. 2021); else 0.

    The final number is what follows the last `####`, else what stands in the last box, else the last number at all.
    """

    field: str = "answer"

    def judge(self, answer: Answer) -> float:
        wanted = final_number(answer.said(self.field, "gsm8k"))
        if wanted is None:
            raise UserError(
                f"{answer.origin}: the reward gsm8k finds no number in the column '{self.field}'; correct the record or drop it."
            )
        return float(final_number(answer.text) == wanted)


def final_number(text: str) -> Decimal | None:
    """The number a text comes to, without thousands separators and dollar signs; None where there is none."""
    boxes = _BOX.findall(text)
    place = text.rsplit(_MARK, 1)[1] if _MARK in text else boxes[-1] if boxes else text
    found = _NUMBER.findall(place)
    if not found:
        return None
    try:
        return Decimal((found[0] if _MARK in text else found[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
