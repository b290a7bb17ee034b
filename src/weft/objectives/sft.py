"""Supervised fine-tuning: next tokens of what the assistant says."""

from torch import Tensor

from weft.data.packing import PackedBatch
from weft.nn import Model, Step
from weft.objectives.next_token import NextToken, step_of
from weft.objectives.settings import NextTokenSettings, SFTSettings
from weft.spec import ModelSpec


class SFT(NextToken):
    """The loss of `NextToken` over the tokens that the batch's mask leaves: answers, in any packing (Ouyang et al. 2022, section 3.5).

    Term `sft`, a mean over the trained tokens of all micro-batches and processes. With `neftune` = a, each document's token vectors get
    noise uniform in +-a / sqrt(L D) while training, L being the document's tokens in the row and D the model's width (Jain et al. 2023,
    algorithm 1), so that it does not depend on how documents are packed. It comes from torch's generator, which a checkpoint holds.
    """

    name = "sft"

    def __init__(self, settings: SFTSettings | None = None, chunk: int | None = None, spec: ModelSpec | None = None) -> None:
        settings = settings or SFTSettings()
        super().__init__(NextTokenSettings(label_smoothing=settings.label_smoothing), chunk, spec=spec)
        self.neftune = settings.neftune

    def step(self, model: Model, batch: PackedBatch) -> Step:
        step = step_of(batch)
        if self.neftune and model.training:
            step.noise = self.neftune / (document_lengths(batch) * model.spec.dim).sqrt()
        return step


def document_lengths(batch: PackedBatch) -> Tensor:
    """The tokens of the document that each place [B, T] belongs to, as float32; at least 1."""
    if batch.segments is None:
        lengths = batch.lengths if batch.lengths is not None else batch.tokens.new_full((len(batch.tokens),), batch.tokens.shape[1])
        return lengths.clamp(min=1)[:, None].expand_as(batch.tokens).float()
    counts = batch.tokens.new_zeros(batch.tokens.shape).scatter_add(1, batch.segments, batch.tokens.new_ones(batch.tokens.shape))
    return counts.gather(1, batch.segments).float()
