"""The next tokens of several continuations: their logits in, ids and reports out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.engine.continuation import Continuation
from weft.engine.grammar import constrain
from weft.engine.request import TokenLogprob
from weft.engine.sampler import History, Sampler, likeliest, token_logprobs

NOT_FINITE = -1


class Chooser:
    """Keeps a sampler for as long as the same continuations run together."""

    def __init__(self) -> None:
        self._batch: list[Continuation] = []
        self._sampler: Sampler | None = None

    def choose(self, batch: list[Continuation], logits: Tensor) -> tuple[list[int], list[TokenLogprob | None]]:
        """Ids for logits [B, V], NOT_FINITE where a row's logits are not finite numbers, and log-probabilities for those who asked."""
        if all(c.plain for c in batch):
            peaks, chosen = likeliest(logits)
        else:
            sampler = self.sampler(batch, logits)
            peaks = logits.amax(-1)
            sound = torch.where(peaks.isfinite()[:, None], logits, 0.0)  # a broken row must not stop the draw of the others
            chosen = sampler.sample(constrain(sound, [c.matcher for c in batch]), [c.uniform() for c in batch])
            sampler.observe(chosen)
        ids: list[int] = torch.where(peaks.isfinite(), chosen, NOT_FINITE).tolist()
        return ids, self.report(batch, logits, ids)

    def sampler(self, batch: list[Continuation], logits: Tensor) -> Sampler:
        if self._sampler is None or self._batch != batch:
            histories = [History(c.task.prompt, c.ids) for c in batch]
            self._batch, self._sampler = batch, Sampler([c.params for c in batch], histories, logits)
        return self._sampler

    def report(self, batch: Sequence[Continuation], logits: Tensor, ids: Sequence[int]) -> list[TokenLogprob | None]:
        """Log-probabilities of ids under logits [B, V], for those who asked."""
        asked = [i for i, c in enumerate(batch) if (c.params.logprobs or c.params.top_logprobs) and ids[i] != NOT_FINITE]
        reports: list[TokenLogprob | None] = [None] * len(batch)
        if asked:
            found = token_logprobs(logits[asked], [ids[i] for i in asked], [batch[i].params.top_logprobs for i in asked])
            for i, report in zip(asked, found, strict=True):
                reports[i] = report
        return reports
