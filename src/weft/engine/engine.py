"""The one engine: requests in, tokens out, for any number of ragged rows at a time.

Prompts are fed in chunks whose bounds depend on the request alone; then all rows advance by a token a step, and a finished row goes to
the next request at once. What a request gets does not depend on what runs beside it: in float64 and in 16-bit formats on a CPU token
for token, in float32 wherever the two likeliest tokens are not within rounding.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft.engine.beam import BeamGroup
from weft.engine.choice import NOT_FINITE, Chooser
from weft.engine.continuation import Continuation, Task
from weft.engine.draft import Draft, Drafter
from weft.engine.grammar import GrammarCompiler, Matcher
from weft.engine.intake import Intake
from weft.engine.lanes import Lane, Lanes
from weft.engine.request import Event, Request, Result, SamplingParams
from weft.engine.sampler import likeliest
from weft.engine.speculation import Speculation, judge
from weft.engine.stats import EngineStats
from weft.engine.stop import TextStream
from weft.errors import UserError
from weft.nn import Model
from weft.nn.pages import PAGE, PagesExhausted

if TYPE_CHECKING:
    from weft.tokenizer import Tokenizer

Job = Continuation | BeamGroup
DAMAGED = "the model's logits are not finite numbers; its weights are damaged, or too large for this dtype: try float32."


class Engine:
    """Generates with one model, which it puts in evaluation mode.

    tokenizer  None serves requests in token ids alone: results have no text, and nothing but `stop_ids` ends one.
    rows       sequences at a time; more requests wait. Fewer where `memory` does not allow as many.
    chunk      tokens of a prompt fed in one pass.
    context    longest sequence, prompt included; None is the model's own.
    memory     bytes for decode state, the prefix cache included; None is a share of what the machine has left. Where it runs out, the
               request that came last gives its state back and is computed again later, with the same result.
    page       tokens a page of state; also the length of the blocks in which the prefix cache finds equal beginnings.
    cache      keep the state of text that was read, so that a prompt that begins with the same tokens is not computed again.
    draft      guesses tokens, of which the model then checks several in one pass, where that is faster. Greedy text stays as it is;
               samples keep their distribution, but with the same seed need not be the same, as how far it pays to guess depends on time
               (a Speculation may fix how far).
    Raises UserError for a model that cannot run token by token, and where memory is too small for one row.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: "Tokenizer | None" = None,
        rows: int = 16,
        chunk: int = 256,
        context: int | None = None,
        memory: int | None = None,
        page: int = PAGE,
        cache: bool = True,
        draft: Drafter | Speculation | None = None,
    ) -> None:
        if rows < 1 or chunk < 1 or page < 1:
            raise UserError(f"rows is {rows}, chunk {chunk} and page {page}; each must be at least 1.")
        self.model, self.tokenizer = model.eval(), tokenizer
        context = min(context or model.spec.context, model.spec.context)
        self.context = context - len(model.virtual_ids)
        if self.context < 1:
            raise UserError(f"the context is {context} tokens, which the model's {len(model.virtual_ids)} virtual tokens fill; allow more.")
        with torch.inference_mode():
            self._lanes = Lanes(model, rows, chunk, context, memory, page, cache)
        self._intake = Intake(model, tokenizer, self._lanes)
        self._waiting: deque[Job] = deque()
        self._siblings: dict[Continuation, list[Continuation]] = {}
        self._early: list[Event] = []
        self._chooser = Chooser()
        self._speculation = draft if draft is None or isinstance(draft, Speculation) else Speculation(draft)
        if self._speculation is not None:
            self._speculation.drafter.check(model)
            if listen := getattr(self._speculation.drafter, "listen", None):
                self._lanes.listen(listen)
        self._stats = EngineStats()
        self._count = 0
        self.grammars = None if tokenizer is None else GrammarCompiler(tokenizer, model.spec.vocab)

    # Requests.

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._lanes.active or self._early)

    @property
    def stats(self) -> EngineStats:
        """Counts and sizes at this moment. May be asked from another thread than the one that steps."""
        unstarted = sum(map(len, list(self._siblings.values())))
        return replace(
            self._stats,
            waiting=len(self._waiting) + unstarted,
            running=len(self._lanes.active),
            cached_prompt_tokens=self._lanes.cached_tokens,
            state_bytes_used=self._lanes.bytes_used,
            state_bytes_allocated=self._lanes.bytes_allocated,
        )

    def submit(self, request: Request) -> int:
        """Take in a request; returns the number under which its events and results come.

        Raises UserError for a prompt that is empty, longer than the context or not of this vocabulary, for a request whose state is
        larger than the memory there is, and for parameters this engine cannot honour.
        """
        task = self._intake.task(self._count, request)
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
            if others:
                self._siblings[first] = others
        return task.number

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
        """Drop a request and free its state; returns what each of its unfinished continuations had so far."""
        results = []
        waiting = [job for job in self._waiting if job.task.number == number]
        running = [lane.owner for lane in self._lanes.active if lane.owner.task.number == number]
        for job in dict.fromkeys([*running, *waiting]):
            jobs = [job, *self._siblings.pop(job, [])] if isinstance(job, Continuation) else []
            results += [continuation.result("cancelled") for continuation in jobs]
            self._end(job)
        return results

    def adapter_number(self, name: str | None) -> int:
        """The number under which passes know an adapter of the model, 0 for the base. Raises UserError for a name that none has."""
        return self._intake.adapter(name)

    def state_bytes(self, length: int) -> int:
        """Bytes of decode state of a text of `length` tokens."""
        return self._lanes.arena.state_bytes(length)

    def clear_cache(self) -> None:
        """Forget the state of finished requests; needed when the model's weights have changed."""
        self._lanes.cache.clear()

    def _end(self, job: Job) -> None:
        """Take a job out of everything that knows it."""
        for lane in _lanes_of(job):
            self._lanes.give_back(lane)
        if job in self._waiting:
            self._waiting.remove(job)
        if self._speculation is not None and isinstance(job, Continuation):
            self._speculation.drafter.release(job)

    # Progress.

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance: at most one pass over prompts, then one token for every row that is past its prompt."""
        if self.model.training:
            self.model.eval()
        events, self._early = self._early, []
        self._admit()
        if lanes := self._with_room(self._next_prompts()):
            events += self._advance(lanes, self._feed_prompts(lanes))
            self._admit()
        if lanes := self._with_room([lane for lane in self._lanes.active if lane.pending == 1]):
            events += self._decode(lanes)
        return events

    def _admit(self) -> None:
        """Give free rows and pages to waiting requests, in their order."""
        while self._waiting:
            job = self._waiting[0]
            width = job.task.params.beams if isinstance(job, BeamGroup) else 1
            if width > self._lanes.available:
                return
            ids = job.task.fed if isinstance(job, BeamGroup) else [*job.task.fed, *job.ids]
            hit = self._lanes.find(ids, job.chain, self._lanes.adapter_of(job))
            if self._lanes.active and not self._lanes.has_room(len(ids), hit):
                return
            self._waiting.popleft()
            leader = self._lanes.take(job, ids, hit, job.chain)
            if isinstance(job, BeamGroup):
                job.lanes = [leader, *(self._lanes.take(job, []) for _ in range(width - 1))]
            else:
                job.lane = leader
            if job.task.memory is not None:
                self._lanes.prime(leader, job.task.memory)

    def _next_prompts(self) -> list[Lane]:
        """Lanes with a prompt to feed, first come first served, as many as make one pass of about two chunks."""
        chosen: list[Lane] = []
        longest = 0
        for lane in sorted((lane for lane in self._lanes.active if lane.pending > 1), key=_age):
            longest = max(longest, min(lane.pending, self._lanes.chunk))
            if chosen and longest * (len(chosen) + 1) > 2 * self._lanes.chunk:
                break
            chosen.append(lane)
        return chosen

    def _with_room(self, lanes: list[Lane]) -> list[Lane]:
        """Those of these lanes that have pages for what they are fed next; where pages run out, the youngest request is preempted."""
        for lane in lanes if len(lanes) == 1 else sorted(lanes, key=_age):
            while lane.live:
                try:
                    self._lanes.reserve(lane, self._lanes.next_count(lane))
                    break
                except PagesExhausted:
                    self._preempt(max(self._lanes.active, key=_age).owner)
        return [lane for lane in lanes if lane.live]

    def _preempt(self, job: Job) -> None:
        """Take a running job's state away and let it wait. A continuation goes on from its tokens, a beam search begins anew."""
        self._stats.preemptions += 1
        self._end(job)
        if isinstance(job, BeamGroup):
            job = BeamGroup(job.task, self.tokenizer)
        else:
            job.lane = None
        self._waiting.appendleft(job)

    def _feed_prompts(self, lanes: Sequence[Lane]) -> Tensor:
        before = sum(lane.fed for lane in lanes)
        logits = self._lanes.feed_chunks(lanes)
        self._stats.prompt_tokens += sum(lane.fed for lane in lanes) - before
        return logits

    def _decode(self, lanes: Sequence[Lane]) -> list[Event]:
        """A token for each lane, or several where drafts of them stand."""
        if self._speculation is None:
            return self._advance(lanes, self._lanes.feed_single(lanes))
        started = perf_counter()
        drafts = self._drafts(lanes, self._speculation)
        drafted, accepted = sum(len(draft.ids) for draft in drafts), self._stats.accepted_tokens
        if drafted:
            events = self._verify(lanes, drafts, self._speculation.drafter)
        else:
            events = self._advance(lanes, self._lanes.feed_single(lanes))
        self._stats.drafted_tokens += drafted
        accepted = self._stats.accepted_tokens - accepted
        longest = max(len(draft.ids) for draft in drafts)
        self._speculation.length.observe(len(lanes), longest, perf_counter() - started, drafted, accepted)
        return events

    def _drafts(self, lanes: Sequence[Lane], speculation: Speculation) -> list[Draft]:
        """Drafts for these lanes, cut to what they may still generate, and dropped where there is no room for them."""
        drafts = speculation.propose(lanes, [self._draft_limit(lane) for lane in lanes])
        for lane, draft in zip(lanes, drafts, strict=True):
            if draft.ids:
                try:
                    self._lanes.reserve(lane, 1 + len(draft.ids))
                except PagesExhausted:
                    speculation.drafter.observe(lane.owner, 0)
                    draft.ids.clear()
        return drafts

    def _draft_limit(self, lane: Lane) -> int:
        """Most tokens that can be drafted for a lane; none where it is at its prompt's end and others are to go on from there."""
        if not isinstance(lane.owner, Continuation) or lane.owner in self._siblings:
            return 0
        return min(lane.owner.task.limit - len(lane.owner.ids) - 1, self._lanes.draft_room(lane))

    def _verify(self, lanes: Sequence[Lane], drafts: Sequence[Draft], drafter: Drafter) -> list[Event]:
        """One pass over the next token of each lane and its draft, and what follows from it."""
        logits, pending = self._lanes.feed_drafts(lanes, [draft.ids for draft in drafts])
        peaks, best = likeliest(logits)
        chosen: list[int] = torch.where(peaks.isfinite(), best, NOT_FINITE).tolist()
        ends = list(accumulate(1 + len(draft.ids) for draft in drafts))
        spans = [slice(end - 1 - len(draft.ids), end) for end, draft in zip(ends, drafts, strict=True)]
        verdicts = {
            lane: judge(lane.owner, draft, logits[span], chosen[span])
            for lane, draft, span in zip(lanes, drafts, spans, strict=True)
            if draft.ids
        }
        standing = [draft.ids[: verdicts[lane].accepted] if draft.ids else [] for lane, draft in zip(lanes, drafts, strict=True)]
        self._lanes.commit_drafts(lanes, pending, standing)
        events = []
        for lane, span, tokens in zip(lanes, spans, standing, strict=True):
            if lane in verdicts:
                drafter.observe(lane.owner, len(tokens))
                events += self._take(lane, tokens, verdicts[lane].token, logits[span])
        others = [(lane, span.start) for lane, span in zip(lanes, spans, strict=True) if lane not in verdicts]
        if others:
            events += self._advance([lane for lane, _ in others], logits[[start for _, start in others]])
        return events

    def _take(self, lane: Lane, standing: list[int], token: int | None, logits: Tensor) -> list[Event]:
        """Hand out the tokens of a draft that stand and the one that follows them, as far as the text goes."""
        continuation: Continuation = lane.owner
        if token is None:
            return self._fail(continuation)
        tokens = [*standing, token]
        reports = self._chooser.report([continuation] * len(tokens), logits[: len(tokens)], tokens)
        events: list[Event] = []
        for each, report in zip(tokens, reports, strict=True):
            events.append(continuation.accept(each, report))
            if events[-1].result is not None:
                break
        self._stats.generated_tokens += len(events)
        self._stats.accepted_tokens += min(len(events), len(standing))
        self._lanes.keep([lane])
        if events[-1].result is None:
            lane.ids.append(token)
        else:
            self._end(continuation)
        return events

    def _advance(self, lanes: Sequence[Lane], logits: Tensor) -> list[Event]:
        """What follows from the logits [B, V] after the last tokens fed to these lanes."""
        if all(lane.pending == 0 and isinstance(lane.owner, Continuation) and lane.owner not in self._siblings for lane in lanes):
            events = self._sample([lane.owner for lane in lanes], logits)
            self._lanes.keep(lanes)
            return events
        finite = logits.amax(-1).isfinite().tolist()
        failed = dict.fromkeys(lane.owner for lane, good in zip(lanes, finite, strict=True) if not good)
        events = [event for job in failed for event in self._fail(job)]
        self._lanes.keep(lanes)
        ready = {lane: i for i, lane in enumerate(lanes) if lane.pending == 0 and lane.live}
        batch: list[Continuation] = []
        index: list[int] = []
        for lane, i in ready.items():
            if isinstance(lane.owner, Continuation):
                together = [lane.owner, *self._fork_siblings(lane.owner)]
                batch += together
                index += [i] * len(together)
        if batch:
            events += self._sample(batch, logits[torch.tensor(index, device=logits.device)])
        for group in dict.fromkeys(lane.owner for lane in ready if isinstance(lane.owner, BeamGroup)):
            rows = [ready[lane] for lane in group.lanes[: len(group.search.running)]]
            events += self._advance_beams(group, logits[rows])
        return events

    def _fork_siblings(self, first: Continuation) -> list[Continuation]:
        """Let the other samples of a request go on from the state after its prompt. Those that find no row wait, and then have most of
        the prompt from the cache."""
        others = self._siblings.pop(first, [])
        forked = others[: self._lanes.available]
        for continuation in forked:
            continuation.lane = self._lanes.take(continuation, [])
            assert first.lane is not None
            self._lanes.fork(first.lane, continuation.lane)
        self._waiting.extendleft(reversed(others[len(forked) :]))
        return forked

    def _sample(self, batch: list[Continuation], logits: Tensor) -> list[Event]:
        """The next token of each continuation, from logits [B, V]."""
        ids, reports = self._chooser.choose(batch, logits)
        events = []
        for continuation, token, report in zip(batch, ids, reports, strict=True):
            if token == NOT_FINITE:
                events += self._fail(continuation)
                continue
            assert continuation.lane is not None
            event = continuation.accept(token, report)
            events.append(event)
            if event.result is None:
                continuation.lane.ids.append(token)
            else:
                self._lanes.keep([continuation.lane])
                self._end(continuation)
        self._stats.generated_tokens += sum(event.token is not None for event in events)
        return events

    def _advance_beams(self, group: BeamGroup, logits: Tensor) -> list[Event]:
        for source, target in group.advance(logits):
            self._lanes.fork(source, target)
        running = group.search.running
        for lane, hypothesis in zip(group.lanes, running, strict=False):
            lane.ids.append(hypothesis.ids[-1])
        for lane in group.lanes[len(running) :]:
            lane.ids = lane.ids[: lane.fed]
        self._stats.generated_tokens += 1
        if not group.search.done:
            return []
        self._end(group)
        return [Event(group.task.number, result.index, None, result.text, None, result) for result in group.results()]

    def _fail(self, job: Job) -> list[Event]:
        """End a job whose logits are not finite, and leave nothing of it in the state."""
        for lane in _lanes_of(job):
            self._lanes.scrub(lane)
        jobs = [job, *self._siblings.pop(job, [])] if isinstance(job, Continuation) else [Continuation(job.task, 0, None)]
        self._end(job)
        results = [continuation.result("error", DAMAGED) for continuation in jobs]
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


def _lanes_of(job: Job) -> list[Lane]:
    lanes = job.lanes if isinstance(job, BeamGroup) else [job.lane]
    return [lane for lane in lanes if lane is not None and lane.live]


def _age(lane: Lane) -> tuple[int, int]:
    """Requests in the order in which they came, the samples of one in theirs."""
    return lane.owner.task.number, getattr(lane.owner, "index", 0)
