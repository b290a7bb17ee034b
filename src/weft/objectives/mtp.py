"""The loss of multi-token prediction: what a model's modules foretell, scored where their tokens lie in one document."""

import torch
from torch import Tensor

from weft.data.packing import PackedBatch
from weft.nn import Model
from weft.nn.model import Output
from weft.objectives.cross_entropy import Smoothing, linear_cross_entropy
from weft.objectives.head import head_of
from weft.train.objective import Term

WEIGHT = 0.3  # DeepSeek-V3's lambda for the first ten trillion tokens (DeepSeek-AI 2024, section 4.2)


def shifted(batch: PackedBatch, k: int) -> tuple[Tensor, Tensor]:
    """Targets [B, T] of depth k, the ids k + 1 places on, and where they are scored, bool [B, T].

    A place is scored where the token k places on lies in its document and is scored itself; what `roll` brings round is not.
    """
    mask = batch.loss_mask.roll(-k, 1)
    mask = mask & (torch.arange(mask.shape[1], device=mask.device) < mask.shape[1] - k)
    if batch.segments is not None:
        mask = mask & (batch.segments.roll(-k, 1) == batch.segments)
    return batch.targets.roll(-k, 1), mask


def mtp_counts(batch: PackedBatch, depth: int) -> dict[str, int]:
    return {f"mtp_{k}": int(shifted(batch, k)[1].sum()) for k in range(1, depth + 1)}


def mtp_terms(model: Model, output: Output, batch: PackedBatch, depth: int, weight: float, smoothing: Smoothing) -> dict[str, Term]:
    """A cross-entropy a depth through the shared head, each a mean over its own tokens; together they weigh `weight`, shared evenly
    (DeepSeek-AI 2024, equations 24 and 25).

    output  of a pass that looked ahead.
    """
    terms = {}
    for k in range(1, depth + 1):
        targets, mask = (t.flatten() for t in shifted(batch, k))
        sums = linear_cross_entropy(output.aux[f"mtp.{k}"].flatten(0, 1), head_of(model), targets.clamp(min=0), mask, smoothing)
        terms[f"mtp_{k}"] = Term(sums.loss, mask.sum(), weight / depth)
    return terms
