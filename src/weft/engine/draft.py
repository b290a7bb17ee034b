"""Drafters: cheap guesses at the next tokens, which the model then checks all in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weft.engine.continuation import Continuation
from weft.engine.filters import draw
from weft.engine.lanes import Lane, Lanes
from weft.engine.random import uniform
from weft.engine.sampler import History, Sampler, likeliest
from weft.errors import UserError
from weft.nn import Model
from weft.nn.arena import Copy
from weft.nn.pages import PagesExhausted

DRAWN_FOR_DRAFT = 2


@dataclass
class Draft:
    """Tokens that may come next, in order.

    probs  the distribution [V] that each token was drawn from; None where nothing was drawn: all the probability was on the token.
    """

    ids: list[int]
    probs: list[Tensor] | None = None


class Drafter(Protocol):
    """Guesses for several texts at a time. What it guesses decides how fast text is generated, never which.

    A drafter may have two more attributes: `longest`, the most tokens it can guess, and `listen`, which hears of every pass of the model
    as `Lanes.listen` tells of it.
    """

    def check(self, model: Model) -> None:
        """Raise UserError where this drafter cannot draft for a model."""

    def propose(self, texts: Sequence[Continuation], most: Sequence[int]) -> list[Draft]:
        """For each text, its prompt and what was generated, up to `most` tokens that may follow; any number of them, none included."""

    def observe(self, text: Continuation, accepted: int) -> None:
        """The first `accepted` tokens of the last draft for this text were right."""

    def release(self, text: Continuation) -> None:
        """A text is finished; nothing more is asked about it."""


def extend(draft: Draft, text: Continuation, logits: Tensor) -> None:
    """Add to a draft the token that logits [1, V] say comes next, by the text's own temperature and filters."""
    if text.plain:
        draft.ids.append(int(likeliest(logits)[1]))
        return
    probs = Sampler([text.params], [History((), ())], logits).distribution(logits)
    if draft.probs is None:
        draft.ids.append(int(probs.argmax()))
        return
    number = uniform(text.task.seed, text.index, len(text.ids) + len(draft.ids), DRAWN_FOR_DRAFT)
    draft.probs.append(probs[0])
    draft.ids.append(int(draw(probs, torch.tensor([number], dtype=torch.float64))))


class NgramDrafter:
    """Prompt look-up: what followed the last time that the text's last tokens occurred in it (Saxena 2023).

    Of the last three, two and one tokens the longest match counts, and of its occurrences the latest. Costs nothing, and is right where
    text repeats itself: code, summaries, answers that quote.
    """

    LONGEST = 3

    def __init__(self) -> None:
        self._indices: dict[Continuation, _Index] = {}

    def check(self, model: Model) -> None:
        pass

    def propose(self, texts: Sequence[Continuation], most: Sequence[int]) -> list[Draft]:
        drafts = []
        for text, count in zip(texts, most, strict=True):
            if text not in self._indices:
                self._indices[text] = _Index(self.LONGEST, text.task.prompt)
            index = self._indices[text]
            index.extend(text.ids[len(index.ids) - len(text.task.prompt) :])
            drafts.append(Draft(index.following(count)))
        return drafts

    def observe(self, text: Continuation, accepted: int) -> None:
        pass

    def release(self, text: Continuation) -> None:
        self._indices.pop(text, None)


class _Index:
    """Where each n-gram of a text last ended, for the lengths up to `longest`; the end of the text itself does not count."""

    def __init__(self, longest: int, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            place = len(self.ids)
            for length, after in enumerate(self._after, 1):
                if length <= place:
                    after[tuple(self.ids[place - length :])] = place
            self.ids.append(token)

    def following(self, count: int) -> list[int]:
        for length in range(len(self._after), 0, -1):
            place = self._after[length - 1].get(tuple(self.ids[-length:]))
            if place is not None and length <= len(self.ids):
                return self.ids[place : place + count]
        return []


class ModelDrafter:
    """A smaller model with the same vocabulary writes ahead, from decode state of its own (Leviathan et al. 2023).

    It goes by each request's own temperature and filters. Its state counts against its own `memory`; where that runs out, or more texts
    come than it has `rows`, the others go without a draft.
    """

    def __init__(self, model: Model, rows: int = 16, chunk: int = 256, context: int | None = None, memory: int | None = None) -> None:
        self.model = model.eval()
        context = min(context or model.spec.context, model.spec.context)
        with torch.inference_mode():
            self._lanes = Lanes(model, rows, chunk, context, memory)
        kinds = {leaf.kind for leaf in self._lanes.arena.leaves.values()}
        if "static" in kinds:
            raise UserError("the draft model attends to a memory, which drafts cannot give it; use a draft model without cross-attention.")
        self._cannot_rewind = "fixed" in kinds
        self._lanes.cache.enabled = not self._lanes.cache.snapshots_needed
        self._held: dict[Continuation, Lane] = {}
        self._before: dict[Continuation, tuple[int, Copy | None]] = {}

    def check(self, model: Model) -> None:
        ours, theirs = self.model.spec.vocab, model.spec.vocab
        if ours != theirs:
            raise UserError(
                f"the draft model has {ours} tokens in its vocabulary and the model {theirs}; take a draft model with the same tokenizer."
            )

    def propose(self, texts: Sequence[Continuation], most: Sequence[int]) -> list[Draft]:
        drafts = {text: Draft([], None if text.params.greedy else []) for text in texts}
        limits = {text: self._limit(text, count) for text, count in zip(texts, most, strict=True)}
        logits = self._read([text for text, count in limits.items() if count > 0])
        for text in logits:
            lane = self._held[text]
            self._before[text] = lane.fed, self._lanes.arena.snapshot(lane.row, paged=False) if self._cannot_rewind else None
        while logits:
            for text, row in logits.items():
                extend(drafts[text], text, row)
            logits = self._feed({text: drafts[text].ids[-1] for text in logits if len(drafts[text].ids) < limits[text]})
        return list(drafts.values())

    def _limit(self, text: Continuation, count: int) -> int:
        """Drafts that this model's own context allows; the last of them is not fed."""
        return min(count, self._lanes.context - len(text.task.prompt) - len(text.ids) + 1)

    def _read(self, texts: Sequence[Continuation]) -> dict[Continuation, Tensor]:
        """Bring the state of each text up to its end; logits [1, V] after it, of those that found room."""
        unread = []
        for text in texts:
            lane, ids = self._held.get(text), [*text.task.prompt, *text.ids]
            if lane is None and self._lanes.available:
                chain: list[bytes] = []
                lane = self._held[text] = self._lanes.take(text, ids, self._lanes.find(ids, chain), chain)
            if lane is not None:
                lane.ids = ids
                unread.append(lane)
        found: dict[Continuation, Tensor] = {}
        while unread := [lane for lane in unread if lane.live and lane.pending]:
            lanes = [lane for lane in unread if self._has_room(lane, self._lanes.next_count(lane))]
            if lanes:
                logits = self._lanes.feed_chunks(lanes)
                self._lanes.keep(lanes)
                found |= {lane.owner: logits[i : i + 1] for i, lane in enumerate(lanes) if not lane.pending}
        return found

    def _has_room(self, lane: Lane, count: int) -> bool:
        try:
            self._lanes.reserve(lane, count)
        except PagesExhausted:
            self.release(lane.owner)
            return False
        return True

    def _feed(self, tokens: dict[Continuation, int]) -> dict[Continuation, Tensor]:
        """One more token for each text; logits [1, V] after it."""
        lanes = []
        for text, token in tokens.items():
            lane = self._held[text]
            lane.ids.append(token)
            if self._has_room(lane, 1):
                lanes.append(lane)
        if not lanes:
            return {}
        lanes.sort(key=lambda lane: lane.row)
        logits = self._lanes.feed_single(lanes)
        return {lane.owner: logits[i : i + 1] for i, lane in enumerate(lanes)}

    def observe(self, text: Continuation, accepted: int) -> None:
        """Go back to the last token that was right; a recurrent state goes back to before the draft, and reads what was right again."""
        if text not in self._before or text not in self._held:
            return
        lane = self._held[text]
        length, copy = self._before.pop(text)
        if copy is None:
            length = min(lane.fed, length + accepted)
        self._lanes.rewind(lane, length, copy)

    def release(self, text: Continuation) -> None:
        self._before.pop(text, None)
        lane = self._held.pop(text, None)
        if lane is not None:
            self._lanes.give_back(lane)
