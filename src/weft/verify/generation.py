"""Checks on the engine: what a request gets does not depend on company, on streaming, or on what was kept of earlier requests."""

from collections.abc import Sequence

from weft.engine import Engine, Request, Result, SamplingParams
from weft.engine.continuation import Continuation
from weft.engine.draft import Draft
from weft.engine.speculation import FixedLength, Speculation
from weft.nn import Model
from weft.verify.check import Outcome
from weft.verify.prompts import Prompt
from weft.verify.subject import Subject

_BLOCK = 8  # tokens a page: short, so that short prompts have some


class Comparison:
    """Collects continuations that ought to be the same, and where they first are not."""

    def __init__(self, subject: Subject, left: str, right: str) -> None:
        self.subject, self.left, self.right = subject, left, right
        self.texts = self.tokens = self.differing = self.tied = 0
        self.first = ""

    def add(self, prompt: Prompt, left: Result, right: Result) -> None:
        """Compare two results; `right` has the log-probabilities of its two likeliest tokens."""
        self.texts += 1
        self.tokens += len(right.ids)
        places = range(max(len(left.ids), len(right.ids)))
        at = next((i for i in places if left.ids[i : i + 1] != right.ids[i : i + 1]), None)
        if at is None:
            if left.finish_reason != right.finish_reason:
                self._differs(f"{prompt}: {self.left} ends with {left.finish_reason}, {self.right} with {right.finish_reason}")
            return
        gap = _gap_at(right, at)
        if gap is not None and gap < self.subject.near_tie:
            self.tied += 1
            return
        ours, theirs = (self.subject.spell(ids[at] if at < len(ids) else None) for ids in (left.ids, right.ids))
        margin = "" if gap is None else f"; the two likeliest are {gap:.2g} nats apart"
        self._differs(f"{prompt}, new token {at + 1}: {self.left} {ours}, {self.right} {theirs}{margin}")

    def _differs(self, where: str) -> None:
        self.differing += 1
        self.first = self.first or where

    def outcome(self, compared: str) -> Outcome:
        detail = f"{compared}, {self.tokens} tokens compared"
        if self.tied:
            detail += f"; {self.tied} parted where the two likeliest are under {self.subject.near_tie:.0e} nats apart, which is rounding"
        return Outcome.measured(self.differing, 0, f"of {self.texts} texts differ", self.first or detail)


def _gap_at(result: Result, at: int) -> float | None:
    """How many nats the two likeliest tokens at a place are apart."""
    top = result.logprobs[at].top if result.logprobs is not None and at < len(result.logprobs) else ()
    return top[0][1] - top[1][1] if len(top) > 1 else None


def _greedy(subject: Subject) -> SamplingParams:
    return SamplingParams(max_tokens=subject.new_tokens, top_logprobs=2, ignore_eos=True)


def _requests(subject: Subject, params: SamplingParams) -> list[Request]:
    return [Request(prompt.ids, params) for prompt in subject.prompts]


def batch_equals_single(subject: Subject) -> Outcome:
    """Greedy continuations of all prompts together, in fewer rows than prompts, against each alone in an engine of its own."""
    requests = _requests(subject, _greedy(subject))
    rows = max(2, len(requests) - 1)
    together = subject.engine(rows).generate(requests)
    comparison = Comparison(subject, "together", "alone")
    for prompt, request, result in zip(subject.prompts, requests, together, strict=True):
        comparison.add(prompt, result, subject.engine(1).generate([request])[0])
    return comparison.outcome(f"{len(requests)} prompts in {rows} rows")


def stream_equals_whole(subject: Subject) -> Outcome:
    """The events of a stream, put together, against the results of the same requests: ids and text, greedy and sampled."""
    halves = [_greedy(subject), SamplingParams(max_tokens=subject.new_tokens, temperature=1.0, top_p=0.95, seed=7)]
    requests = [Request(prompt.ids, halves[number % 2]) for number, prompt in enumerate(subject.prompts)]
    whole = subject.engine(len(requests)).generate(requests)
    differing, first, characters = 0, "", 0
    for number, (ids, text, result) in enumerate(_streamed(subject.engine(len(requests)), requests)):
        wrong = _stream_mistake(ids, text, result, whole[number])
        differing += bool(wrong)
        characters += len(text)
        if wrong and not first:
            first = f"{subject.prompts[number]}: {wrong}"
    return Outcome.measured(differing, 0, f"of {len(requests)} texts differ", first or f"{characters} characters compared")


def _streamed(engine: Engine, requests: Sequence[Request]) -> list[tuple[list[int], str, Result]]:
    """The ids and the text that the events of each request give, with its result."""
    gathered: dict[int, tuple[list[int], list[str]]] = {}
    results: dict[int, Result] = {}
    for event in engine.stream(requests):
        ids, texts = gathered.setdefault(event.request, ([], []))
        ids += [] if event.token is None else [event.token]
        texts.append(event.text)
        if event.result is not None:
            results[event.request] = event.result
    return [(ids, "".join(texts), results[number]) for number, (ids, texts) in sorted(gathered.items())]


def _stream_mistake(ids: list[int], text: str, result: Result, whole: Result) -> str:
    """What is wrong with a stream, or nothing."""
    for got, want, what in ((tuple(ids), whole.ids, "ids"), (text, whole.text, "text"), (result.text, whole.text, "final text")):
        if got != want:
            at = next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), min(len(got), len(want)))
            return f"the streamed {what} differs from the whole at place {at + 1}: {got[at : at + 8]!r}, {want[at : at + 8]!r}"
    return ""


def kept_state_equals_fresh(subject: Subject) -> Outcome:
    """Prompts that begin as an earlier one did, answered from the state kept of it, against a fresh engine.

    They part from it after a third, near the end, and at each place of a block in turn, with what follows left as it was: a cache that
    takes one text for another is found out.
    """
    params = _greedy(subject)
    engine = Engine(subject.model, subject.tokenizer, rows=2, page=_BLOCK)
    comparison = Comparison(subject, "from kept state", "fresh")
    for number, prompt in enumerate(subject.longest(3)):
        first = engine.generate([Request(prompt.ids, params)])[0]
        follow_ups = [prompt.ids, (*prompt.ids[: len(prompt.ids) // 3], *first.ids[:3]), (*prompt.ids[:-2], *first.ids[:2])]
        if number == 0:
            follow_ups += _with_another_token(prompt.ids, subject.model.spec.vocab)
        for ids in follow_ups:
            request = Request(ids[: subject.model.spec.context - subject.new_tokens], params)
            comparison.add(prompt, engine.generate([request])[0], subject.engine(1).generate([request])[0])
    kept = engine.stats.cached_prompt_tokens
    if not kept:
        return Outcome.skipped("no prompt is long enough for its state to be kept; give longer ones")
    return comparison.outcome(f"{comparison.texts} follow-ups, {kept} tokens of which had been kept")


def _with_another_token(ids: tuple[int, ...], vocab: int) -> list[tuple[int, ...]]:
    """A text as often as a block has places, each time with another token at the next of them; the first of these again at the end."""
    places = range(len(ids) // 2, min(len(ids) // 2 + _BLOCK, len(ids)))
    texts = [(*ids[:place], (ids[place] + 1) % vocab, *ids[place + 1 :]) for place in places]
    return [*texts, *texts[:1]]


class Rehearsed:
    """Drafts texts that are known, every third token of them wrong, so that drafts stand whole, in part and not at all."""

    def __init__(self, texts: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self.texts = texts

    def check(self, model: Model) -> None:
        pass

    def propose(self, texts: Sequence[Continuation], most: Sequence[int]) -> list[Draft]:
        drafts = []
        for text, count in zip(texts, most, strict=True):
            start, known = len(text.ids), self.texts[text.task.prompt]
            length = min(count, 1 + start % 4)
            drafts.append(Draft([known[0] if place % 3 == 2 else known[place] for place in range(start, min(start + length, len(known)))]))
        return drafts

    def observe(self, text: Continuation, accepted: int) -> None:
        pass

    def release(self, text: Continuation) -> None:
        pass


def speculation_equals_plain(subject: Subject) -> Outcome:
    """Greedy continuations written with drafts, several tokens a pass, against those written token by token."""
    comparison = Comparison(subject, "with drafts", "without")
    accepted = drafted = 0
    for prompt in subject.prompts:
        request = Request(prompt.ids, _greedy(subject))
        plain = subject.engine(1).generate([request])[0]
        drafter = Speculation(Rehearsed({tuple(prompt.ids): plain.ids}), FixedLength(4))
        engine = Engine(subject.model, subject.tokenizer, rows=1, draft=drafter)
        comparison.add(prompt, engine.generate([request])[0], plain)
        accepted, drafted = accepted + engine.stats.accepted_tokens, drafted + engine.stats.drafted_tokens
    return comparison.outcome(f"{accepted} of {drafted} drafted tokens stood")
