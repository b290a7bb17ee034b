"""The judges a recipe may name, and a user's own function."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weft.errors import UserError, unknown
from weft.rewards.numbers import GSM8K
from weft.rewards.python import PythonFunction
from weft.rewards.reward import Answer, Reward, Weighed
from weft.rewards.text import Format, Length, Match
from weft.spec.base import parse

REWARDS: dict[str, type[Reward]] = {"gsm8k": GSM8K, "match": Match, "format": Format, "length": Length, "python": PythonFunction}
OWN = ".py:"  # in the name of a user's own function: "judge.py:score"


class Judge:
    """Several rewards as one: the sum of their numbers, each times its weight.

    Raises UserError where one fails, or gives something that is not a finite number.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Callable[[Answer], float]]]) -> None:
        self.parts = dict(parts)

    def numbers(self, answer: Answer) -> dict[str, float]:
        """Each reward's number by name, without its weight."""
        return {name: _call(name, function, answer) for name, (_, function) in self.parts.items()}

    def total(self, numbers: Mapping[str, float]) -> float:
        return math.fsum(self.parts[name][0] * number for name, number in numbers.items())


def open_judge(rewards: Mapping[str, Any]) -> Judge:
    """The judge that a recipe's `rewards` describe: names with a weight, or with a mapping of settings.

    A name `file.py:function` is a function of the user's, from `Answer` to a number. Its file is run: that is her own code, and only a
    recipe that names it runs it. Raises UserError for unknown names and settings, and for a file or function that is not there.
    """
    parts: dict[str, tuple[float, Callable[[Answer], float]]] = {}
    for name, given in rewards.items():
        settings = given if isinstance(given, Mapping) else {"weight": given}
        if OWN in name:
            plain: Weighed = parse(Weighed, dict(settings), f"the reward {name}")
            parts[name] = plain.weight, _own_function(name)
            continue
        if name not in REWARDS:
            raise unknown("reward", name, [*REWARDS, "FILE.py:FUNCTION"])
        reward: Reward = parse(REWARDS[name], dict(settings), f"the reward {name}")
        parts[name] = reward.weight, reward.judge
    return Judge(parts)


def check_rewards(rewards: Mapping[str, Any]) -> None:
    """Raise UserError for what `open_judge` would refuse, without running anybody's file."""
    open_judge({name: given for name, given in rewards.items() if OWN not in name})
    for name in rewards:
        if OWN in name:
            _own_file(name)


def own_files(rewards: Mapping[str, Any]) -> list[Path]:
    """The files of a user's that a recipe's `rewards` name; a run goes on only while they are the same."""
    return sorted({_own_file(name)[0] for name in rewards if OWN in name})


def _own_file(name: str) -> tuple[Path, str]:
    file, _, function = name.rpartition(":")
    if not Path(file).is_file() or not function.isidentifier():
        raise UserError(f"the reward {name} names a function of yours, but there is no file {file}; give PATH.py:FUNCTION.")
    return Path(file), function


def _own_function(name: str) -> Callable[[Answer], float]:
    path, function = _own_file(name)
    spec = importlib.util.spec_from_file_location(f"weft_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever her file does
        raise UserError(f"the reward {name}: {path} could not be run ({type(error).__name__}: {error}); correct it.") from error
    found: Callable[[Answer], float] | None = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"the reward {name}: {path} has no function {function}; write one that takes an answer and returns a number.")
    return found


def _call(name: str, function: Callable[[Answer], float], answer: Answer) -> float:
    try:
        number = float(function(answer))
    except UserError:
        raise
    except Exception as error:  # a user's own function
        raise UserError(f"{answer.origin}: the reward {name} failed ({type(error).__name__}: {error}); correct the function.") from error
    if not math.isfinite(number):
        raise UserError(
            f"{answer.origin}: the reward {name} gave {number} for the answer {_short(answer.text)}; a reward has to be a finite number: "
            "correct the function."
        )
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
