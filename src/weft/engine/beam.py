"""Beam search: the likeliest continuations as a whole, instead of the likeliest token each time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from weft.engine.continuation import Task
from weft.engine.lanes import Lane
from weft.engine.prefix import Chain
from weft.engine.request import Result, TokenLogprob
from weft.engine.sampler import wide
from weft.engine.stop import before_stop

if TYPE_CHECKING:
    from weft.tokenizer import Tokenizer


@dataclass(frozen=True)
class Hypothesis:
    """A continuation with the log-probability of each of its tokens (natural)."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    ended: bool = False

    def extended(self, token: int, total: float, ended: bool) -> "Hypothesis":
        return Hypothesis((*self.ids, token), (*self.logprobs, total - self.total), total, ended)


class BeamSearch:
    """Keeps the `width` likeliest unfinished continuations and the `width` best finished ones.

    Finished ones are compared by total log-probability / length ** length_penalty, their end token counted (Wu et al. 2016, equation
    14, in transformers' form). A candidate may finish only where it is among the `width` likeliest of its step. The search is over
    when the likeliest unfinished one would not win if it ended now.

    ends       whether a continuation ends with its last token.
    num_ends   how many tokens of the vocabulary can make it true, so that enough candidates are looked at.
    limit      most tokens.
    patient    go on until no unfinished one can win at any length up to the limit (early_stopping="never" in transformers); with a
               width that keeps everything the search is then exhaustive.
    """

    def __init__(
        self,
        width: int,
        length_penalty: float,
        limit: int,
        ends: Callable[[tuple[int, ...]], bool],
        num_ends: int = 1,
        patient: bool = False,
    ) -> None:
        self.width, self.length_penalty, self.limit, self.patient = width, length_penalty, limit, patient
        self._ends, self._spare = ends, 1 + num_ends
        self.running = [Hypothesis()]
        self.finished: list[Hypothesis] = []

    def score(self, hypothesis: Hypothesis) -> float:
        return self._normalised(hypothesis.total, len(hypothesis.ids))

    def _normalised(self, total: float, length: int) -> float:
        return total / math.pow(length, self.length_penalty)

    def advance(self, logits: Tensor) -> list[int]:
        """Extend the running continuations by their next tokens' logits [len(running), V]; returns for each new one its parent's number.

        Ties go to the better parent, then to the lowest id.
        """
        parents: list[int] = []
        running: list[Hypothesis] = []
        for rank, (total, parent, token) in enumerate(self._candidates(logits)):
            if len(running) == self.width:
                break
            ids = (*self.running[parent].ids, token)
            ended = self._ends(ids)
            if not ended or rank < self.width:
                hypothesis = self.running[parent].extended(token, total, ended)
                if ended or len(ids) >= self.limit:
                    self.finished.append(hypothesis)
                else:
                    running.append(hypothesis)
                    parents.append(parent)
        self.running = running
        self.finished = sorted(self.finished, key=lambda h: (-self.score(h), h.ids))[: self.width]
        return parents

    def _candidates(self, logits: Tensor) -> Sequence[tuple[float, int, int]]:
        """The likeliest extensions, best first, as (total log-probability, parent, token): enough that `width` of them go on."""
        logprobs = wide(logits).log_softmax(-1).double()
        totals = logprobs.new_tensor([h.total for h in self.running])[:, None] + logprobs
        vocab = totals.shape[1]
        best = totals.flatten().topk(min(self.width * self._spare, totals.numel()))
        flat = sorted(zip(best.values.tolist(), best.indices.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
        return [(total, *divmod(index, vocab)) for total, index in flat]

    @property
    def done(self) -> bool:
        if not self.running:
            return True
        if len(self.finished) < self.width:
            return False
        # Totals only fall, but with a positive penalty a longer text may still gain by its length, at most up to the limit.
        length = self.limit if self.patient and self.length_penalty > 0 else len(self.running[0].ids)
        return self._normalised(self.running[0].total, length) <= self.score(self.finished[-1])

    def best(self, count: int) -> list[Hypothesis]:
        """The best finished continuations, best first."""
        return self.finished[:count]


class BeamGroup:
    """A request under beam search, and the lanes its continuations run in: as many as beams, some of them idle at times."""

    def __init__(self, task: Task, tokenizer: "Tokenizer | None") -> None:
        self.task, self.tokenizer = task, tokenizer
        self.lanes: list[Lane] = []
        self.chain: Chain = []
        params, stops = task.params, task.params.stop
        num_ends = len(task.ends) + bool(stops)
        self.search = BeamSearch(params.beams, params.length_penalty, task.limit, self._ends, max(1, num_ends))

    def _ends(self, ids: tuple[int, ...]) -> bool:
        return ids[-1] in self.task.ends or (bool(self.task.params.stop) and self._text(ids)[1])

    def _text(self, ids: tuple[int, ...]) -> tuple[str, bool]:
        if self.tokenizer is None:
            return "", False
        return before_stop(self.tokenizer.decode(ids[:-1] if ids[-1:] and ids[-1] in self.task.ends else ids), self.task.params.stop)

    def advance(self, logits: Tensor) -> list[tuple[Lane, Lane]]:
        """Take one step with the logits of the running lanes, in order. Returns the copies of state to make, as (from, to)."""
        parents = self.search.advance(logits)
        free = [lane for number, lane in enumerate(self.lanes) if number not in parents]
        claimed: set[int] = set()
        lanes, copies = [], []
        for parent in parents:
            # A parent's first child stays in its row; the others go to rows that nobody goes on in, so no source is overwritten.
            lane = self.lanes[parent] if parent not in claimed else free.pop()
            if parent in claimed:
                copies.append((self.lanes[parent], lane))
            claimed.add(parent)
            lanes.append(lane)
        self.lanes = lanes + free
        return copies

    def results(self) -> list[Result]:
        """The n best continuations, best first."""
        asked = self.task.params.logprobs or self.task.params.top_logprobs
        return [
            Result(
                request=self.task.number,
                index=rank,
                text=self._text(hypothesis.ids)[0],
                ids=hypothesis.ids,
                finish_reason="stop" if hypothesis.ended else "length",
                prompt_tokens=len(self.task.prompt),
                logprobs=tuple(map(TokenLogprob, hypothesis.ids, hypothesis.logprobs)) if asked else None,
                score=self.search.score(hypothesis),
            )
            for rank, hypothesis in enumerate(self.search.best(self.task.params.n))
        ]
