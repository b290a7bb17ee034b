"""Speculative decoding: whether to draft and how far, and which tokens of a draft stand."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.engine.choice import NOT_FINITE
from weft.engine.continuation import Continuation
from weft.engine.draft import Draft, Drafter
from weft.engine.filters import draw
from weft.engine.lanes import Lane
from weft.engine.random import uniform
from weft.engine.sampler import History, Sampler

DRAWN_TO_ACCEPT = 1
LONGEST_DRAFT = 8


@dataclass(frozen=True)
class Verdict:
    """What became of a draft: its first `accepted` tokens stand, and `token` follows them; None where logits were not finite."""

    accepted: int
    token: int | None


def accept(target: Tensor, draft: Draft, uniforms: Sequence[float], finals: Sequence[float]) -> Verdict:
    """The rule of speculative sampling (Leviathan et al. 2023, section 2.3): exactly the model's own distribution comes out.

    target    [k + 1, V], what the model would have drawn from at each place of a draft of k tokens and after it.
    uniforms  k numbers in [0, 1): a token x that was drawn from q stands where its own is below p(x) / q(x).
    finals    k + 1 others, for the token after those that stand: it is drawn from p after a whole draft, else from what p has more of
              than q, max(0, p - q), normalised.
    """
    length = len(draft.ids)
    places, ids = torch.arange(length), torch.tensor(draft.ids, dtype=torch.long)
    p = target[places, ids].tolist()
    q = [1.0] * length if draft.probs is None else [float(probs[token]) for probs, token in zip(draft.probs, draft.ids, strict=True)]
    standing = 0
    while standing < length and uniforms[standing] * q[standing] < p[standing]:
        standing += 1
    rest = target[standing].clone()
    if standing < length:
        if draft.probs is None:
            rest[draft.ids[standing]] = 0.0
        else:
            rest = (rest - draft.probs[standing].to(rest)).clamp(min=0)
        if not float(rest.sum()) > 0:  # rounding has left nothing: p and q are equal
            rest = target[standing]
    return Verdict(standing, int(draw(rest[None], torch.tensor([finals[standing]], dtype=torch.float64))))


def judge(text: Continuation, draft: Draft, logits: Tensor, chosen: Sequence[int]) -> Verdict:
    """Which tokens of a draft stand, for logits [k + 1, V] whose likeliest tokens are `chosen`, -1 where they are not finite."""
    if NOT_FINITE in chosen:
        return Verdict(0, None)
    if text.plain:
        right = 0
        while right < len(draft.ids) and draft.ids[right] == chosen[right]:
            right += 1
        return Verdict(right, chosen[right])
    places = range(len(text.ids), len(text.ids) + len(chosen))
    sampler = Sampler([text.params] * len(places), [History((), ())] * len(places), logits)
    uniforms = [uniform(text.task.seed, text.index, place, DRAWN_TO_ACCEPT) for place in places]
    finals = [uniform(text.task.seed, text.index, place) for place in places]
    return accept(sampler.distribution(logits), draft, uniforms, finals)


class DraftLength:
    """Decides from what passes cost, and from how many drafted tokens stood, how many to draft; 0 where drafting does not pay.

    With a share a of drafted tokens standing, each alike, a pass with k of them yields (1 - a^(k+1)) / (1 - a) tokens (Leviathan et al.
    2023, equation 1). The k with the most tokens a second is taken, now and then the one below or above it, and now and then none, so
    that what passes cost stays known. Where none is best, drafting rests for some passes, for twice as many each time, and is then tried
    again. What is decided changes the speed alone.

    most  longest draft.
    """

    WARM, REFRESH = 3, 64
    FIRST_REST, LONGEST_REST, TRIAL = 16, 1024, 4
    WEIGHT = 0.2
    EXPECTED_SHARE, EXPECTED_COST = 0.5, 0.1

    def __init__(self, most: int = LONGEST_DRAFT) -> None:
        self.most = most
        self.share = self.EXPECTED_SHARE
        self._seconds: dict[tuple[int, int], float] = {}
        self._passes: Counter[tuple[int, int]] = Counter()
        self._turns = 0
        self._resting = 0
        self._rest = self.FIRST_REST
        self._trial = 0

    def choose(self, rows: int) -> int:
        """How many tokens to draft for each of so many rows."""
        size = _size(rows)
        if self._passes[size, 0] < self.WARM:
            return 0  # first learn what a pass costs without
        if self._resting:
            self._resting -= 1
            self._trial = self.TRIAL if self._resting == 0 else 0
            return 0
        best = max(range(self.most + 1), key=lambda count: self._rate(size, count))
        if best:
            self._rest = self.FIRST_REST
            self._turns += 1
            if self._turns % self.REFRESH == 0:
                return 0
            change = {4: -1, 12: 1}.get(self._turns % 16, 0)
            return min(max(1, best + change), self.most)
        if self._trial:
            self._trial -= 1
            return min(2, self.most)
        self._resting, self._rest = self._rest, min(2 * self._rest, self.LONGEST_REST)
        return 0

    def observe(self, rows: int, count: int, seconds: float, drafted: int, accepted: int) -> None:
        """A pass over so many rows, the longest draft of which had `count` tokens, took so long; of all that was drafted, so many stood."""
        key = (_size(rows), count)
        known = self._seconds.get(key, seconds)
        self._passes[key] += 1
        if self._passes[key] <= self.WARM:  # the first passes of a kind also pay for what is done once
            self._seconds[key] = min(known, seconds)
        else:  # a pause of the machine is not the cost of a pass
            self._seconds[key] = known + self.WEIGHT * (min(seconds, 3 * known) - known)
        if drafted:
            weight = 1 - (1 - self.WEIGHT / 4) ** drafted
            self.share += weight * (accepted / drafted - self.share)

    def _rate(self, size: int, count: int) -> float:
        """Expected tokens a second."""
        share = min(self.share, 0.99)
        return (1 - share ** (count + 1)) / (1 - share) / self._cost(size, count)

    def _cost(self, size: int, count: int) -> float:
        """Seconds of a pass with drafts of this length: measured, or on a line through the nearest measured ones."""
        known = self._seconds.get((size, count))
        if known is not None:
            return known
        base = self._seconds[size, 0]
        below = max(other for rows, other in self._seconds if rows == size and other < count)
        above = min((other for rows, other in self._seconds if rows == size and other > count), default=None)
        if above is not None:
            part = (count - below) / (above - below)
            return self._seconds[size, below] * (1 - part) + self._seconds[size, above] * part
        slope = (self._seconds[size, below] - base) / below if below else self.EXPECTED_COST * base
        return self._seconds[size, below] + max(slope, 0.0) * (count - below)


class FixedLength(DraftLength):
    """As many tokens as are allowed, whatever it costs."""

    def choose(self, rows: int) -> int:
        return self.most


def _size(rows: int) -> int:
    """Numbers of rows that are taken to cost alike: the next power of two."""
    return 1 << (rows - 1).bit_length()


class Speculation:
    """A drafter and what is known of its use.

    Rows whose next token depends on those before it by more than the model go without drafts: penalties and grammars. So do beams.
    """

    def __init__(self, drafter: Drafter, length: DraftLength | None = None) -> None:
        self.drafter = drafter
        self.length = length or DraftLength(getattr(drafter, "longest", LONGEST_DRAFT))

    def propose(self, lanes: Sequence[Lane], most: Sequence[int]) -> list[Draft]:
        """A draft for each lane, of at most so many tokens and often empty."""
        drafts = [Draft([]) for _ in lanes]
        count = self.length.choose(len(lanes))
        asked = [i for i, lane in enumerate(lanes) if min(count, most[i]) > 0 and _draftable(lane.owner)]
        if asked:
            found = self.drafter.propose([lanes[i].owner for i in asked], [min(count, most[i]) for i in asked])
            for i, draft in zip(asked, found, strict=True):
                drafts[i] = draft
        return drafts


def _draftable(owner: object) -> bool:
    return isinstance(owner, Continuation) and not owner.params.penalised and owner.matcher is None
