"""What is asked of the engine and what it gives back."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from weft.engine.grammar import Grammar
from weft.errors import UserError

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. Raises UserError for values that mean nothing.

    max_tokens           most tokens to generate; None goes on to a stop or the end of the context.
    temperature          0 is greedy: the likeliest token, the lowest id on a tie.
    top_k                sample among the k likeliest tokens; 0 is off. Tokens as likely as the last one stay too.
    top_p                sample among the likeliest tokens that together reach this probability (Holtzman et al. 2020); 1 is off.
    min_p                leave out tokens less likely than this share of the likeliest one's probability (Nguyen et al. 2024); 0 is off.
    repetition_penalty   logits of tokens in the prompt or the text so far are divided by it, multiplied where negative (Keskar et al.
                         2019, equation 2); 1 is off.
    presence_penalty     taken once from the logit of every token generated so far.
    frequency_penalty    taken from a token's logit as often as it was generated so far.
    logit_bias           added to the logits of these token ids before anything else.
    seed                 makes the samples reproducible, whatever else is generated beside them; None draws one.
    stop                 texts that end generation; the result's text ends before them.
    stop_ids             tokens that end generation, besides the tokenizer's own end tokens.
    ignore_eos           go on through the tokenizer's end tokens.
    logprobs             report each token's log-probability (natural, of the model itself: before penalties, temperature and filters).
    top_logprobs         also report this many of the likeliest tokens at each place.
    n                    continuations of the prompt: samples, or with beams the best n of them.
    beams                above 1: beam search of that width, without sampling.
    length_penalty       beams are compared by log-probability / length ** length_penalty (Wu et al. 2016, in transformers' form).
    grammar              what the text must match; it may end only where it does, and ends where nothing may follow.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    n: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
        _whole("top_k", self.top_k, 0)
        _whole("top_logprobs", self.top_logprobs, 0)
        _whole("n", self.n, 1)
        _whole("beams", self.beams, 1)
        _number("temperature", self.temperature, 0.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, above=True)
        for name in ("presence_penalty", "frequency_penalty", "length_penalty"):
            _number(name, getattr(self, name), -math.inf)
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise UserError(f"seed is {self.seed!r}; give a whole number from 0 to 2^63 - 1.")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop", _texts(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.beams > 1:
            sampling = [name for name, off in _OFF.items() if getattr(self, name) != off]
            if sampling:
                raise UserError(
                    f"beams is {self.beams} and {sampling[0]} {getattr(self, sampling[0])}; beam search takes the likeliest texts as they "
                    "are: drop one of the two."
                )
            if self.constrained:
                raise UserError(f"beams is {self.beams} and a grammar is given; beam search does not follow grammars: drop one of the two.")
            if self.n > self.beams:
                raise UserError(f"n is {self.n} and beams {self.beams}; beam search gives at most as many texts as it has beams.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def constrained(self) -> bool:
        """Whether the tokens that are allowed depend on the text so far."""
        return self.grammar is not None

    @property
    def penalised(self) -> bool:
        """Whether a token's logit depends on the tokens before it by more than the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_OFF = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
}


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, as text or as token ids, and how to continue it.

    memory   entries [S, M] for a model with cross-attention: an encoder's output, an image.
    adapter  the name of one of the adapters that stand side by side in the model; None is the base without any.
    """

    prompt: str | Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    memory: Tensor | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the likeliest alternatives as (id, log-probability), best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """One finished continuation.

    request        the number that `Engine.submit` gave its request.
    index          which of the request's n continuations; with beams, its rank.
    text           what was generated, without end tokens and without the stop string.
    ids            every token that was generated, an end token included.
    finish_reason  "stop": an end token, a stop string or the end of the grammar; "length": max_tokens or the end of the context;
                   "cancelled"; "error": see `error`.
    logprobs       one a token where they were asked for.
    seed           what reproduces it; None where nothing was drawn.
    score          with beams: log-probability / length ** length_penalty.
    error          what went wrong, as a sentence.
    """

    request: int
    index: int
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    seed: int | None = None
    score: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Event:
    """One token of one continuation, as it appears; the last one carries the result.

    token   None where there is none: the result of a beam search, or of a request that ends before its first token.
    text    what can be shown now: whole characters, and nothing that may yet turn out to be a stop string; often empty.
    """

    request: int
    index: int
    token: int | None
    text: str
    logprob: TokenLogprob | None = None
    result: Result | None = None


def fresh_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbelow(2**53)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(name: str, value: int, least: int) -> None:
    if not _is_int(value) or value < least:
        raise UserError(f"{name} is {value!r}; give a whole number of at least {least}.")


def _number(name: str, value: float, least: float, most: float = math.inf, above: bool = False) -> None:
    """Raise unless least <= value <= most, or with `above` least < value <= most."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most
    if fits and not (above and value == least):
        return
    lower = "" if least == -math.inf else f" {'above' if above else 'of at least'} {least:g}"
    upper = "" if most == math.inf else f" and at most {most:g}"
    raise UserError(f"{name} is {value!r}; give a finite number{lower}{upper}.")


def _biases(given: Mapping[int, float]) -> dict[int, float]:
    for token, bias in given.items():
        if not _is_int(token) or token < 0:
            raise UserError(f"logit_bias is given for {token!r}; its keys are token ids, whole numbers from 0.")
        _number(f"logit_bias of token {token}", bias, -math.inf)
    return dict(given)


def _texts(stop: Sequence[str] | str) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError("a stop string is empty; give texts of at least one character.")
    return texts
