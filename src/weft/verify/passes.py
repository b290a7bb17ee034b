"""Checks on single passes of the model: the same tokens fed in different pieces give the same logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.engine.sampler import wide
from weft.nn import Arena, Model
from weft.verify.check import Outcome
from weft.verify.prompts import Prompt
from weft.verify.subject import Subject, limit_of

_HEAD_TOKENS = 64  # places whose logits are in memory at a time
_SINGLE_TOKENS = 48
_PROMPTS = 4


@dataclass(frozen=True)
class Gap:
    """How far two lists of logits are apart: the largest difference, relative to the largest logit, a place."""

    by_place: tuple[float, ...]
    same_best: int

    @property
    def worst(self) -> float:
        return max(self.by_place)

    def first_above(self, limit: float) -> int | None:
        return next((place for place, gap in enumerate(self.by_place) if not gap <= limit), None)


def feed(model: Model, ids: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Hidden states [T, D] of ids fed through decode state in pieces of these sizes, whose last one repeats."""
    tokens = torch.tensor([ids], device=model.device)
    arena = Arena(model, 1, len(ids), min(max(sizes), len(ids)))
    parts, at, turn = [], 0, 0
    while at < len(ids):
        size = min(sizes[min(turn, len(sizes) - 1)], len(ids) - at)
        n_new = torch.tensor([size], device=tokens.device)
        output = model(tokens[:, at : at + size], arena.step(n_new, size, keep="last"), arena.views())
        arena.commit(output.pending, n_new)
        parts.append(output.hidden[0])
        at, turn = at + size, turn + 1
    return torch.cat(parts)


def logit_gap(model: Model, ours: Tensor, theirs: Tensor) -> Gap:
    """The distance of the logits that two tensors of hidden states [T, D] lead to."""
    slices = [slice(at, at + _HEAD_TOKENS) for at in range(0, ours.shape[0], _HEAD_TOKENS)]
    return gap_of([(wide(model.logits(ours[part])), wide(model.logits(theirs[part]))) for part in slices])


def gap_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Gap:
    """The distance of logits given in pieces [T, V]. What is not finite is infinitely far."""
    scale = max(float(theirs.abs().max()) for _, theirs in pairs) or 1.0
    differences = torch.cat([(ours - theirs).abs().amax(-1) for ours, theirs in pairs]) / scale
    same = sum(int((ours.argmax(-1) == theirs.argmax(-1)).sum()) for ours, theirs in pairs)
    return Gap(tuple(differences.nan_to_num(nan=float("inf"), posinf=float("inf")).tolist()), same)


def outcome_of(compared: Sequence[tuple[str, Prompt, Gap]], limit: float, note: str = "") -> Outcome:
    """The verdict over comparisons, each with what was compared in words; `note` begins its detail."""
    worst = max(gap.worst for _, _, gap in compared)
    places = sum(len(gap.by_place) for _, _, gap in compared)
    best = sum(gap.same_best for _, _, gap in compared)
    detail = f"logits of {places} tokens; the likeliest token is the same at {best}"
    for what, prompt, gap in compared:
        place = gap.first_above(limit)
        if place is not None:
            detail = f"{what}: logits first differ after token {place + 1} of {prompt}, by {gap.by_place[place]:.2g} of the largest logit"
            break
    return Outcome.measured(worst, limit, "of the largest logit", note + detail)


@torch.inference_mode()
def chunked_equals_whole(subject: Subject) -> Outcome:
    """Prompts fed in chunks of several sizes, and their last tokens one at a time, against one pass."""
    model, compared = subject.model, []
    for prompt in subject.longest(_PROMPTS):
        length = len(prompt.ids)
        whole = feed(model, prompt.ids, [length])
        for size in subject.chunks:
            if size < length:
                compared.append((f"chunks of {size} against one pass", prompt, logit_gap(model, feed(model, prompt.ids, [size]), whole)))
        if length > 1:
            single = feed(model, prompt.ids, [max(1, length - _SINGLE_TOKENS), 1])
            compared.append(("single tokens against one pass", prompt, logit_gap(model, single, whole)))
    if not compared:
        return Outcome.skipped("every prompt is a single token; give longer ones")
    return outcome_of(compared, limit_of(model))


@torch.inference_mode()
def incremental_equals_parallel(subject: Subject) -> Outcome:
    """Decoding token by token, after a prefill where a prompt is long, against the pass of training, which keeps no state.

    The two are different code, whose 16-bit results differ by rounding: so it is done in float32 where memory allows.
    """
    model = subject.model if subject.dtype == torch.float64 else subject.in_float32() or subject.model
    compared = []
    for prompt in subject.longest(_PROMPTS):
        prefill = len(prompt.ids) - _SINGLE_TOKENS
        decoded = feed(model, prompt.ids, [prefill, 1] if prefill > 0 else [1])
        parallel = model(torch.tensor([prompt.ids], device=subject.device)).hidden[0]
        compared.append(("token by token against one parallel pass", prompt, logit_gap(model, decoded, parallel)))
    return outcome_of(compared, limit_of(model), f"{str(model.dtype).removeprefix('torch.')}: ")
