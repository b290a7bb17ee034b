"""Whether a sampled function is Python: parsed, never run."""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.quickstart.python_source import parse_python

Z = 1.959964  # of a normal distribution: 95% of it lies within


@dataclass(frozen=True)
class ParseShare:
    """How many of `samples` functions parsed; `finished` of them ended before the token limit. Bounds are Wilson's at 95%."""

    accepted: int
    finished: int
    samples: int

    @property
    def share(self) -> float:
        return self.accepted / self.samples if self.samples else 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        return wilson(self.accepted, self.samples)


def wilson(successes: int, trials: int, z: float = Z) -> tuple[float, float]:
    """The interval for a share of Wilson (1927), equation 4: it stays within 0 and 1, and has a width even at 0 of n."""
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def take_body(text: str) -> tuple[str, bool]:
    """What of a continuation belongs to the function: everything before the first line at the left margin. And whether there is one.

    A model that goes on to the next function is so judged by the one that was asked for. What comes before the first line end carries on
    the prompt's last line.
    """
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if number and line.strip() and not line[0].isspace():
            return "".join(lines[:number]), True
    return text, False


def is_function(prompt: str, body: str) -> bool:
    """Whether signature, docstring and body parse as one function that does something: its docstring alone does not count."""
    tree = parse_python(prompt + body)
    if tree is None or len(tree.body) != 1:
        return False
    node = tree.body[0]
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1


def judge(prompts: Sequence[str], continuations: Sequence[str], ended: Sequence[bool]) -> ParseShare:
    """Count accepted samples.

    ended   whether the model ended its text by itself; a line at the left margin ends a function as well.
    """
    accepted = finished = 0
    for prompt, continuation, end in zip(prompts, continuations, ended, strict=True):
        body, left = take_body(continuation)
        accepted += is_function(prompt, body)
        finished += end or left
    return ParseShare(accepted, finished, len(prompts))
