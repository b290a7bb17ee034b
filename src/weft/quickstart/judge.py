"""Whether a sampled function is Python: parsed, never run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.rewards.python import count_lines, read_function, take_body

Z = 1.959964  # of a normal distribution: 95% of it lies within


@dataclass(frozen=True)
class ParseShare:
    """How many of `samples` functions parsed; `finished` of them ended before the token limit. Bounds are Wilson's at 95%.

    acting      of those accepted, how many have a body with an effect.
    parameters  of those accepted, and `used`, how many of them the bodies read.
    lines       of the accepted bodies, blank ones left out.
    """

    accepted: int
    finished: int
    samples: int
    acting: int = 0
    parameters: int = 0
    used: int = 0
    lines: int = 0

    @property
    def share(self) -> float:
        return self.accepted / self.samples if self.samples else 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        return wilson(self.accepted, self.samples)

    @property
    def share_used(self) -> float:
        """Of the parameters of accepted functions, those that are read."""
        return self.used / self.parameters if self.parameters else 0.0

    @property
    def mean_lines(self) -> float:
        return self.lines / self.accepted if self.accepted else 0.0


def wilson(successes: int, trials: int, z: float = Z) -> tuple[float, float]:
    """The interval for a share of Wilson (1927), equation 4: it stays within 0 and 1, and has a width even at 0 of n."""
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def is_function(prompt: str, body: str) -> bool:
    """Whether signature, docstring and body parse as one function that does something: its docstring alone does not count."""
    return read_function(prompt, body) is not None


def judge(prompts: Sequence[str], continuations: Sequence[str], ended: Sequence[bool]) -> ParseShare:
    """Count accepted samples.

    ended   whether the model ended its text by itself; a line at the left margin ends a function as well.
    """
    finished, lines, found = 0, 0, []
    for prompt, continuation, end in zip(prompts, continuations, ended, strict=True):
        body, left = take_body(continuation)
        function = read_function(prompt, body)
        finished += end or left
        if function is not None:
            found.append(function)
            lines += count_lines(body)
    counts = {"acting": sum(not f.idle for f in found), "parameters": sum(f.parameters for f in found), "used": sum(f.used for f in found)}
    return ParseShare(len(found), finished, len(prompts), lines=lines, **counts)
