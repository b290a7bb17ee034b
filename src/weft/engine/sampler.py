"""The choice of the next token, for all rows of a batch at once.

The order is that of transformers: biases, repetition, presence and frequency penalties, temperature, top-k, top-p, min-p, and then a draw.
A row's outcome depends on its own logits, parameters, history and random number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.engine import filters
from weft.engine.request import SamplingParams, TokenLogprob

BLOCK = 64


@dataclass(frozen=True)
class History:
    """What one row's penalties look back on: token ids of the prompt, and of the text generated so far."""

    prompt: Sequence[int]
    generated: Sequence[int]


class Sampler:
    """Chooses tokens for rows with these parameters, in this order.

    Made anew when the rows change: histories are read once here and then kept up by `observe`.
    """

    def __init__(self, params: Sequence[SamplingParams], histories: Sequence[History], logits: Tensor) -> None:
        self.params = list(params)
        self.vocab = logits.shape[-1]
        self._like = wide(logits[:0])
        self._greedy = torch.tensor([p.greedy for p in params], device=logits.device)
        self._all_greedy, self._any_greedy = all(p.greedy for p in params), any(p.greedy for p in params)
        self._seen = self._counts = None
        if any(p.repetition_penalty != 1 for p in params):
            self._seen = self._count([[*h.prompt, *h.generated] for h in histories]) > 0
        if any(p.presence_penalty or p.frequency_penalty for p in params):
            self._counts = self._count([h.generated for h in histories])
        self._bias = self._biases()
        self._columns: dict[str, Tensor] = {}

    def _biases(self) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
        """Where biases go, as (rows, ids), and what they are; None without any."""
        entries = [(row, token, bias) for row, p in enumerate(self.params) for token, bias in p.logit_bias.items()]
        if not entries:
            return None
        rows, ids, values = zip(*entries, strict=True)
        device = self._like.device
        return (torch.tensor(rows, device=device), torch.tensor(ids, device=device)), self._like.new_tensor(values)

    def _count(self, ids: Sequence[Sequence[int]]) -> Tensor:
        rows = [torch.tensor(row, dtype=torch.long).bincount(minlength=self.vocab) for row in ids]
        return torch.stack(rows).to(self._like.device)

    def _column(self, name: str) -> Tensor:
        """One parameter of every row, [B]."""
        if name not in self._columns:
            dtype = torch.long if name == "top_k" else self._like.dtype
            self._columns[name] = torch.tensor([getattr(p, name) for p in self.params], dtype=dtype, device=self._like.device)
        return self._columns[name]

    def penalise(self, logits: Tensor) -> Tensor:
        """Logits [B, V] in float32 (float64 stays) with biases and penalties applied."""
        logits = wide(logits)
        if self._bias is not None:
            logits = logits.index_put(*self._bias, accumulate=True)
        if self._seen is not None:
            logits = filters.penalise_repeats(logits, self._seen, self._column("repetition_penalty"))
        if self._counts is not None:
            presence, frequency = self._column("presence_penalty"), self._column("frequency_penalty")
            logits = filters.penalise_counts(logits, self._counts, presence, frequency)
        return logits

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities [B, V] that tokens are drawn from; for a greedy row, 1 at the likeliest token (the lowest id on a tie)."""
        return self._distribution(self.penalise(logits))

    def _distribution(self, logits: Tensor) -> Tensor:
        if self._any_greedy:
            best = torch.zeros_like(logits).scatter_(1, likeliest(logits)[1][:, None], 1.0)
            if self._all_greedy:
                return best
        heated = filters.heat(logits, torch.where(self._greedy, 1.0, self._column("temperature")))
        kept = filters.keep_top_k(heated, self._column("top_k"))
        kept = filters.keep_top_p(kept, self._column("top_p"))
        kept = filters.keep_min_p(kept, self._column("min_p"))
        probs = kept.softmax(-1)
        return torch.where(self._greedy[:, None], best, probs) if self._any_greedy else probs

    def sample(self, logits: Tensor, uniforms: Sequence[float]) -> Tensor:
        """Ids [B] for logits [B, V], one number in [0, 1) a row (greedy rows do not use theirs)."""
        logits = self.penalise(logits)
        if self._all_greedy:
            return likeliest(logits)[1]
        return filters.draw(self._distribution(logits), torch.tensor(uniforms, dtype=torch.float64))

    def observe(self, ids: Tensor) -> None:
        """Take note of the tokens [B] that were chosen."""
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, ids[:, None], torch.ones_like(ids)[:, None])


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of logits [B, V] and its id, the lowest on a tie, each [B]; nan where a row has one.

    Block by block, because torch finds maxima of blocks fast, and the place of one in a long row slowly.
    """
    logits = wide(logits)
    vocab = logits.shape[-1]
    whole = vocab - vocab % BLOCK
    if vocab < BLOCK * BLOCK:
        return logits.max(-1)[:2]
    blocks = logits[:, :whole].view(-1, whole // BLOCK, BLOCK)
    number = blocks.amax(-1).argmax(-1)
    peak, offset = blocks[torch.arange(len(number), device=number.device), number].max(-1)
    index = number * BLOCK + offset
    if whole < vocab:
        last, offset = logits[:, whole:].max(-1)
        better = (last > peak) | (last.isnan() & ~peak.isnan())
        peak, index = torch.where(better, last, peak), torch.where(better, whole + offset, index)
    return peak, index


def wide(logits: Tensor) -> Tensor:
    """Logits in float32; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_logprobs(logits: Tensor, ids: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of ids [B] under logits [B, V], and of the `top` [B] likeliest tokens a row."""
    logprobs = wide(logits).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(top), logits.shape[-1])
    values, indices = ([[]] * len(ids), [[]] * len(ids)) if most == 0 else (t.tolist() for t in logprobs.topk(most))
    reports = []
    for row, index in enumerate(ids):
        ranked = sorted(zip(indices[row], values[row], strict=True), key=lambda pair: (-pair[1], pair[0]))
        reports.append(TokenLogprob(index, chosen[row], tuple(ranked[: top[row]])))
    return reports
