"""The one engine: requests in, tokens out, for any number of ragged rows at a time.

Prompts are fed in chunks whose bounds depend on the request alone; then all rows advance by a token a step, and a finished row goes to
the next request at once. What a request gets does not depend on what runs beside it: in float64 and in 16-bit formats on a CPU token
for token, in float32 wherever the two likeliest tokens are not within rounding.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.engine.beam import BeamGroup
from weft.engine.continuation import Continuation, Task
from weft.engine.grammar import GrammarCompiler, Matcher, constrain
from weft.engine.lanes import Lane, Lanes
from weft.engine.request import Event, Request, Result, SamplingParams, TokenLogprob, fresh_seed
from weft.engine.sampler import History, Sampler, token_logprobs
from weft.engine.stop import TextStream
from weft.errors import UserError
from weft.nn import Model

if TYPE_CHECKING:
    from weft.tokenizer import Tokenizer

Job = Continuation | BeamGroup
NOT_FINITE = "the model's logits are not finite numbers; its weights are damaged, or too large for this dtype: try float32."


class Engine:
    """Generates with one model, which it puts in evaluation mode.

    tokenizer  None serves requests in token ids alone: results have no text, and nothing but `stop_ids` ends one.
    rows       sequences at a time; more requests wait.
    chunk      tokens of a prompt fed in one pass.
    context    longest sequence, prompt included; None is the model's own.
    reuse      keep the state of finished requests, so that a prompt that begins with the same tokens is not computed again (a
               conversation). The chunks of such a prompt begin where the kept state ends.
    Raises UserError for a model that cannot run token by token.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: "Tokenizer | None" = None,
        rows: int = 16,
        chunk: int = 256,
        context: int | None = None,
        reuse: bool = False,
    ) -> None:
        if rows < 1 or chunk < 1:
            raise UserError(f"rows is {rows} and chunk {chunk}; both must be at least 1.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context = min(context or model.spec.context, model.spec.context)
        with torch.inference_mode():
            self._lanes = Lanes(model, rows, chunk, self.context, reuse)
        self._attends_memory = any(leaf.kind == "static" for leaf in self._lanes.arena.leaves.values())
        self._waiting: deque[Job] = deque()
        self._shared: dict[Continuation, tuple[dict[Any, Tensor], Tensor]] = {}
        self._siblings: dict[Continuation, list[Continuation]] = {}
        self._early: list[Event] = []
        self._sampler: tuple[list[Continuation], Sampler] | None = None
        self._count = 0
        self.grammars = None if tokenizer is None else GrammarCompiler(tokenizer, model.spec.vocab)

    # Requests.

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._lanes.active or self._early)

    def submit(self, request: Request) -> int:
        """Take in a request; returns the number under which its events and results come.

        Raises UserError for a prompt that is empty, longer than the context or not of this vocabulary, and for parameters this
        engine cannot honour.
        """
        task = self._task(request)
        self._count += 1
        if task.limit <= 0:
            indices = range(task.params.n)
            done = [Continuation(task, index, None).result("length") for index in indices]
            self._early += [Event(task.number, result.index, None, "", None, result) for result in done]
        elif task.params.beams > 1:
            self._waiting.append(BeamGroup(task, self.tokenizer))
        else:
            matchers = [self._matcher(task.params) for _ in range(task.params.n)]
            first, *others = (Continuation(task, i, self._text_stream(task), matcher) for i, matcher in enumerate(matchers))
            self._waiting.append(first)
            self._siblings[first] = others
        return task.number

    def _task(self, request: Request) -> Task:
        params, tokenizer = request.params, self.tokenizer
        if isinstance(request.prompt, str):
            if tokenizer is None:
                raise UserError("the prompt is text, but this engine has no tokenizer; give token ids, or an engine with a tokenizer.")
            prompt = tuple(tokenizer.encode(request.prompt))
        else:
            prompt = tuple(request.prompt)
        if params.stop and tokenizer is None:
            raise UserError("stop strings are given, but this engine has no tokenizer; give stop_ids, or an engine with a tokenizer.")
        if params.constrained and tokenizer is None:
            raise UserError("a grammar is given, but this engine has no tokenizer; give an engine with a tokenizer.")
        self._check_prompt(prompt)
        foreign = next((token for token in params.logit_bias if token >= self.model.spec.vocab), None)
        if foreign is not None:
            raise UserError(f"logit_bias has the token id {foreign}, but the model's ids go from 0 to {self.model.spec.vocab - 1}.")
        if params.beams > self._lanes.limit:
            raise UserError(f"beams is {params.beams} and the engine has {self._lanes.limit} rows; lower beams or raise rows.")
        if (request.memory is not None) != self._attends_memory:
            given = "given" if request.memory is not None else "missing"
            takes = "attends to a memory" if self._attends_memory else "has no cross-attention"
            raise UserError(f"the request's memory is {given}, but this model {takes}; give a memory where and only where one is used.")
        ends = set(params.stop_ids)
        if tokenizer is not None and not params.ignore_eos:
            ends |= set(tokenizer.eos_ids)
        limit = self.context - len(prompt)
        limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
        seed = fresh_seed() if params.seed is None else params.seed
        return Task(self._count, prompt, params, frozenset(ends), limit, seed, request.memory)

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise UserError("the prompt has no tokens; give at least one.")
        if len(prompt) > self.context:
            raise UserError(f"the prompt has {len(prompt)} tokens and the model's context is {self.context}; shorten the prompt.")
        vocab = self.model.spec.vocab
        foreign = next((token for token in prompt if not 0 <= token < vocab), None)
        if foreign is not None:
            raise UserError(f"the prompt has the token id {foreign}, but the model's ids go from 0 to {vocab - 1}; use its own tokenizer.")

    def _text_stream(self, task: Task) -> TextStream | None:
        if self.tokenizer is None:
            return None
        # A grammar counts every character, so the space that SentencePiece writes before a first word stays.
        return TextStream(self.tokenizer.stream_decoder(whole_text=not task.params.constrained), task.params.stop)

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.grammar is None:
            return None
        assert self.grammars is not None
        return self.grammars.matcher(params.grammar)

    @torch.inference_mode()
    def cancel(self, number: int) -> list[Result]:
        """Drop a request; returns what each of its unfinished continuations had so far."""
        results = []
        waiting = [job for job in self._waiting if job.task.number == number]
        running = [lane.owner for lane in self._lanes.active if lane.owner.task.number == number]
        for job in dict.fromkeys([*running, *waiting]):
            jobs = [job, *self._siblings.pop(job, [])] if isinstance(job, Continuation) else []
            results += [continuation.result("cancelled") for continuation in jobs]
            self._end(job)
        return results

    def _end(self, job: Job) -> None:
        """Take a job out of everything that knows it."""
        lanes = job.lanes if isinstance(job, BeamGroup) else [job.lane] if job.lane else []
        for lane in lanes:
            self._lanes.give_back(lane)
        if job in self._waiting:
            self._waiting.remove(job)
        if isinstance(job, Continuation):
            self._shared.pop(job, None)

    # Progress.

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance: at most one pass over prompts, then one token for every row that is past its prompt."""
        if self.model.training:
            self.model.eval()
        events, self._early = self._early, []
        events += self._admit()
        if lanes := self._next_prompts():
            events += self._advance(lanes, self._lanes.feed_chunks(lanes))
            events += self._admit()
        if lanes := [lane for lane in self._lanes.active if lane.pending == 1]:
            events += self._advance(lanes, self._lanes.feed_single(lanes))
        if not self._waiting:
            self._lanes.shrink()
        return events

    def _admit(self) -> list[Event]:
        """Give free rows to waiting requests, in their order."""
        events = []
        while self._waiting:
            job = self._waiting[0]
            width = _width(job)
            if width > self._lanes.available:
                break
            self._waiting.popleft()
            waiting = width + sum(map(_width, islice(self._waiting, self._lanes.limit)))
            if isinstance(job, BeamGroup):
                job.lanes = [self._lanes.take(job, job.task.prompt if i == 0 else [], waiting - i) for i in range(width)]
                leader = job.lanes[0]
            else:
                leader = job.lane = self._lanes.take(job, job.task.prompt, waiting)
                if job in self._shared:
                    state, logits = self._shared.pop(job)
                    self._lanes.restore(leader, state)
                    events += self._sample([job], logits)
                    continue
            if job.task.memory is not None:
                self._lanes.prime(leader, job.task.memory)
        return events

    def _next_prompts(self) -> list[Lane]:
        """Lanes with a prompt to feed, first come first served, as many as make one pass of about two chunks."""
        chosen: list[Lane] = []
        longest = 0
        for lane in self._lanes.active:
            if lane.pending > 1:
                longest = max(longest, min(lane.pending, self._lanes.chunk))
                if chosen and longest * (len(chosen) + 1) > 2 * self._lanes.chunk:
                    break
                chosen.append(lane)
        return chosen

    def _advance(self, lanes: Sequence[Lane], logits: Tensor) -> list[Event]:
        """What follows from the logits [B, V] after the last tokens fed to these lanes."""
        peaks = logits.amax(-1)
        failed = dict.fromkeys(lane.owner for lane, good in zip(lanes, peaks.isfinite().tolist(), strict=True) if not good)
        events = [event for job in failed for event in self._fail(job)]
        ready = [i for i, lane in enumerate(lanes) if lane.pending == 0 and lane.owner not in failed]
        if len(ready) < len(lanes):
            logits = logits[torch.tensor(ready, dtype=torch.long, device=logits.device)]
        owners = [lanes[i].owner for i in ready]
        singles = [i for i, owner in enumerate(owners) if isinstance(owner, Continuation)]
        for i in singles:
            self._share(owners[i], logits[i : i + 1])
        if singles:
            events += self._sample([owners[i] for i in singles], logits if len(singles) == len(owners) else logits[singles])
        for group in dict.fromkeys(owner for owner in owners if isinstance(owner, BeamGroup)):
            order = {lanes[i].row: n for n, i in enumerate(ready)}
            rows = [order[lane.row] for lane in group.lanes[: len(group.search.running)]]
            events += self._advance_beams(group, logits[rows])
        return events

    def _share(self, first: Continuation, logits: Tensor) -> None:
        """Hand the state after the prompt to the other continuations of the same request."""
        others = self._siblings.pop(first, [])
        if others:
            assert first.lane is not None
            shared = self._lanes.snapshot(first.lane), logits.clone()
            self._shared |= dict.fromkeys(others, shared)
            self._waiting.extendleft(reversed(others))

    def _sample(self, batch: list[Continuation], logits: Tensor) -> list[Event]:
        if self._sampler is None or self._sampler[0] != batch:
            histories = [History(c.task.prompt, c.ids) for c in batch]
            self._sampler = batch, Sampler([c.params for c in batch], histories, logits)
        sampler = self._sampler[1]
        chosen = sampler.sample(constrain(logits, [c.matcher for c in batch]), [c.uniform() for c in batch])
        sampler.observe(chosen)
        ids: list[int] = chosen.tolist()
        reports = self._report(batch, logits, ids)
        events = []
        for continuation, token, report in zip(batch, ids, reports, strict=True):
            assert continuation.lane is not None
            event = continuation.accept(token, report)
            events.append(event)
            if event.result is None:
                continuation.lane.ids.append(token)
            else:
                self._end(continuation)
        return events

    def _report(self, batch: Sequence[Continuation], logits: Tensor, ids: Sequence[int]) -> list[TokenLogprob | None]:
        """Log-probabilities for those who asked."""
        asked = [i for i, c in enumerate(batch) if c.params.logprobs or c.params.top_logprobs]
        reports: list[TokenLogprob | None] = [None] * len(batch)
        if asked:
            found = token_logprobs(logits[asked], [ids[i] for i in asked], [batch[i].params.top_logprobs for i in asked])
            for i, report in zip(asked, found, strict=True):
                reports[i] = report
        return reports

    def _advance_beams(self, group: BeamGroup, logits: Tensor) -> list[Event]:
        for source, target in group.advance(logits):
            self._lanes.fork(source, target)
        running = group.search.running
        for lane, hypothesis in zip(group.lanes, running, strict=False):
            lane.ids.append(hypothesis.ids[-1])
        for lane in group.lanes[len(running) :]:
            lane.ids = lane.ids[: lane.fed]
        if not group.search.done:
            return []
        self._end(group)
        return [Event(group.task.number, result.index, None, result.text, None, result) for result in group.results()]

    def _fail(self, job: Job) -> list[Event]:
        """End a job whose logits are not finite, and leave nothing of it in the state."""
        for lane in job.lanes if isinstance(job, BeamGroup) else [job.lane]:
            if lane is not None:
                self._lanes.scrub(lane)
        jobs = [job, *self._siblings.pop(job, [])] if isinstance(job, Continuation) else [Continuation(job.task, 0, None)]
        self._end(job)
        results = [continuation.result("error", NOT_FINITE) for continuation in jobs]
        return [Event(result.request, result.index, None, "", None, result) for result in results]

    # Conveniences.

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Events of these requests until all are finished; those still running when the caller stops listening are cancelled.

        Raises UserError as `submit` does, before anything is generated, and where a request ends in an error.
        """
        if self.busy:
            raise UserError("the engine is busy with other requests; use submit and step to add more, or another engine.")
        numbers: list[int] = []
        try:
            for request in requests:
                numbers.append(self.submit(request))
            while self.busy:
                for event in self.step():
                    if event.result is not None and event.result.finish_reason == "error":
                        raise UserError(event.result.error)
                    yield event
        finally:
            for number in numbers:
                self.cancel(number)
            self._early.clear()

    def generate(self, requests: Iterable[Request]) -> list[Result]:
        """Run requests to their end. Results come in the order of the requests, the continuations of one in theirs."""
        results = [event.result for event in self.stream(requests) if event.result is not None]
        return sorted(results, key=lambda result: (result.request, result.index))


def _width(job: Job) -> int:
    return job.task.params.beams if isinstance(job, BeamGroup) else 1
