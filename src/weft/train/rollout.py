"""Answers from the model that is being trained, through the one engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft import kernels
from weft.engine import Engine, Request, SamplingParams
from weft.errors import UserError
from weft.nn import Model
from weft.train.objective import POLICY, Models
from weft.train.parallel import World

if TYPE_CHECKING:
    from weft.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampled:
    """One answer.

    ids       every token of it, an end token included.
    text      without end token and stop string.
    finished  whether the model ended it; else it was cut off at the limit.
    """

    ids: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: see `weft.objectives.settings.OnlineSettings`. Nothing but the temperature bends the model's distribution, so
    that a loss knows it."""

    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    in_flight: int = 64


@dataclass
class Rollouts:
    """What an online objective works with between two updates: the models by role, and text from the policy.

    products  dtype of matrix products, by autocast, of `passes`; sampling computes in the weights' own.
    micro     rows of a pass; None takes all at once.
    models    by role; whoever puts the run together fills it.
    """

    tokenizer: "Tokenizer"
    sampling: Sampling
    device: torch.device
    products: torch.dtype = torch.float32
    micro: int | None = None
    world: World = field(default_factory=World)
    models: Models = field(default_factory=dict)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], n: int = 1) -> list[list[Sampled]]:
        """n answers to each prompt, given in token ids, from the policy as it is now.

        Answers are a function of weights, prompts, seeds and n, but for what float32 rounds otherwise when other rows are beside it. Every
        call has an engine, and so a decode state, of its own: what was computed with earlier weights is gone.
        Raises UserError where the policy's logits are no longer finite.
        """
        policy, chosen = self.models[POLICY], self.sampling
        params = [SamplingParams(chosen.max_tokens, chosen.temperature, seed=seed, stop=chosen.stop, n=n) for seed in seeds]
        answers: list[list[Sampled]] = [[] for _ in prompts]
        with _at_rest(policy):
            engine = Engine(policy, self.tokenizer, rows=min(chosen.in_flight, max(1, n * len(prompts))))
            for result in engine.generate(Request(prompt, param) for prompt, param in zip(prompts, params, strict=True)):
                answers[result.request].append(Sampled(result.ids, result.text, result.finish_reason == "stop"))
        return answers

    @torch.no_grad()
    def passes(self, num_rows: int, compute: Callable[[int, int], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute(start, stop)` says of rows start … stop - 1, for all rows, in as many passes as training takes: tensors [rows, …]
        on the CPU, shorter ones padded with zeros along their second axis. Models are put in eval mode and back. The bits are those of the
        passes that training makes of the same rows where it is not compiled: until the weights change, ratios are 1 and divergences 0."""
        found: dict[str, list[Tensor]] = {}
        size = self.micro or num_rows
        narrow = self.products in (torch.bfloat16, torch.float16)
        rest = _at_rest(*self.models.values())
        with rest, kernels.unused(), torch.autocast(self.device.type, dtype=self.products, enabled=narrow):
            for start in range(0, num_rows, size):
                for name, value in compute(start, min(start + size, num_rows)).items():
                    found.setdefault(name, []).append(value.cpu())
        return {name: _joined(values) for name, values in found.items()}


def check_sampling(sampling: Sampling, tokenizer: "Tokenizer") -> None:
    """Raise UserError where nothing could end an answer before its limit."""
    if not tokenizer.eos_ids and not sampling.stop:
        raise UserError(
            "the tokenizer has no end token, so every answer would go on to its limit; give objective.stop a text that ends one, or a "
            "tokenizer with an end token."
        )


@contextmanager
def _at_rest(*models: Model) -> Iterator[None]:
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _joined(values: list[Tensor]) -> Tensor:
    if values[0].dim() < 2:
        return torch.cat(values)
    longest = max(value.shape[1] for value in values)
    return torch.cat([torch.nn.functional.pad(value, (0, longest - value.shape[1])) for value in values])
