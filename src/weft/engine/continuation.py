"""One continuation on its way: its tokens, its text, and whether it is over."""

from dataclasses import dataclass, field

from torch import Tensor

from weft.engine.grammar import Matcher
from weft.engine.lanes import Lane
from weft.engine.prefix import Chain
from weft.engine.random import uniform
from weft.engine.request import Event, FinishReason, Result, SamplingParams, TokenLogprob
from weft.engine.stop import TextStream


@dataclass(frozen=True, eq=False)
class Task:
    """A request as the engine sees it: checked, its prompt in tokens.

    ends   tokens that end it.     limit  most tokens to generate.     seed  what its samples come from.
    virtual  the model's virtual tokens, which are fed before the prompt and are no part of it.
    adapter  the number of its adapter among several, 0 for none.
    """

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    ends: frozenset[int]
    limit: int
    seed: int
    memory: Tensor | None
    virtual: tuple[int, ...] = ()
    adapter: int = 0

    @property
    def fed(self) -> tuple[int, ...]:
        """What the model reads before it writes."""
        return (*self.virtual, *self.prompt)


@dataclass(eq=False)
class Continuation:
    """Sample number `index` of a task."""

    task: Task
    index: int
    stream: TextStream | None
    matcher: Matcher | None = None
    lane: Lane | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    chain: Chain = field(default_factory=list)

    def __post_init__(self) -> None:
        params = self.task.params
        self.params: SamplingParams = params
        # Whether the next token is the likeliest one as the model has it.
        self.plain = params.greedy and not params.penalised and not params.logit_bias and self.matcher is None

    def uniform(self) -> float:
        """The random number of the token to come."""
        return 0.0 if self.params.greedy else uniform(self.task.seed, self.index, len(self.ids))

    def accept(self, token: int, logprob: TokenLogprob | None) -> Event:
        """Append a token; the event has the result where it ends the continuation."""
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        reason: FinishReason | None = None
        piece = ""
        if token in self.task.ends:
            reason = "stop"
        else:
            piece = self.stream.push(token) if self.stream else ""
            if self.matcher:
                self.matcher.accept(token)
            if (self.stream and self.stream.stopped) or (self.matcher and self.matcher.done):
                reason = "stop"
            elif len(self.ids) >= self.task.limit:
                reason = "length"
            elif self.matcher and self.matcher.failed:
                reason = "error"
        if reason is not None and self.stream:
            piece += self.stream.finish()
        error = f"the grammar could not be followed to its end: {self.matcher.failed}." if self.matcher and reason == "error" else None
        return Event(self.task.number, self.index, token, piece, logprob, self.result(reason, error) if reason else None)

    def result(self, reason: FinishReason, error: str | None = None) -> Result:
        """The outcome so far, ended for this reason."""
        if self.stream:
            self.stream.finish()
        return Result(
            request=self.task.number,
            index=self.index,
            text=self.stream.text if self.stream else "",
            ids=tuple(self.ids),
            finish_reason=reason,
            prompt_tokens=len(self.task.prompt),
            logprobs=tuple(self.logprobs) if self.params.logprobs or self.params.top_logprobs else None,
            seed=None if self.params.greedy else self.task.seed,
            error=error,
        )
