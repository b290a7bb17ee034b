"""Prompts to be answered: what an online run reads."""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import torch

from weft.data.examples import ExampleBatches
from weft.data.packing import PackedBatch
from weft.data.record_kinds import Said

HELD_OUT = -1  # what stands for the step in the seeds of held-out prompts: they are answered with the same luck at every look


@dataclass(frozen=True)
class PromptExample:
    """A prompt as a model reads it, and as a judge does."""

    ids: tuple[int, ...]
    prompt: Said
    origin: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """The prompts of one step.

    seeds  a number a prompt, from which its answers are drawn.
    luck   a number of the step, the same on every process.
    step   of the run; HELD_OUT for prompts that are only looked at.
    text   rows of other data that are learned from beside the answers (PPO-ptx), or None.
    """

    examples: tuple[PromptExample, ...]
    seeds: tuple[int, ...] = ()
    step: int = 0
    text: PackedBatch | None = None
    luck: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.examples)

    def rows(self, start: int, stop: int) -> "PromptBatch":
        return replace(self, examples=self.examples[start:stop], seeds=self.seeds[start:stop])

    def to(self, device: torch.device | str) -> "PromptBatch":
        return self


def collate(examples: Sequence[PromptExample]) -> PromptBatch:
    return PromptBatch(tuple(examples))


def prompt_seed(seed: int, step: int, row: int) -> int:
    """The seed of a prompt's answers: a function of the run's seed, the step and the prompt's row in the global batch, so that a resumed
    run, and one on another number of processes, draws the same ones."""
    return int.from_bytes(blake2b(struct.pack("<Qqq", seed, step, row), digest_size=7).digest(), "little")


class PromptBatches(ExampleBatches[PromptExample, PromptBatch]):
    """Batches of prompts that know from what their answers are drawn; everything else is `ExampleBatches`.

    samples     answers to each prompt; `length` is of a prompt with one.
    text        gives the rows of other data of a step, or is None.
    facts       what else the steps depend on: the other data, the files of judges.
    """

    samples: int = 1
    text: Callable[[int], PackedBatch] | None = None
    facts: Mapping[str, Any] = MappingProxyType({})

    @property
    def tokens_per_batch(self) -> int:
        return super().tokens_per_batch * self.samples

    def batch(self, step: int) -> PromptBatch:
        first = step * self.batch_size + self.rank * (self.batch_size // self.world)
        found = super().batch(step)
        seeds = tuple(prompt_seed(self.seed, step, first + row) for row in range(found.num_rows))
        luck = prompt_seed(self.seed, step, -1)
        return replace(found, seeds=seeds, step=step, text=None if self.text is None else self.text(step), luck=luck)

    def validation(self, max_batches: int | None = None) -> Iterator[PromptBatch]:
        row = 0
        for found in super().validation(max_batches):
            seeds = tuple(prompt_seed(self.seed, HELD_OUT, (row + i) * self.world + self.rank) for i in range(found.num_rows))
            row += found.num_rows
            yield replace(found, seeds=seeds, step=HELD_OUT)

    def describe(self) -> dict[str, Any]:
        return super().describe() | dict(self.facts)
