"""The unit that is compiled: a model together with the arena that holds its state."""

from collections.abc import Callable

from torch import Tensor, nn

from weft import kernels
from weft.nn.arena import Arena, Rows
from weft.nn.model import Model, Output, Pending

COARSE_FROM = 32  # tokens of a pass


class Runner(nn.Module):
    """Feed new tokens, commit them all, return logits after the last one. State lives in the arena's buffers, so that CUDA
    graphs may update it in place."""

    def __init__(self, model: Model, arena: Arena) -> None:
        super().__init__()
        self.model, self.arena = model, arena
        self.listener: Callable[[Tensor], None] | None = None  # told of the hidden states [B, T, D] of every pass

    def forward(
        self, tokens: Tensor, n_new: Tensor, rows: Rows = None, columns: int | None = None, adapters: Tensor | None = None
    ) -> Tensor:
        """tokens [B, T] int64, right padded; n_new [B] valid ones a row, 0 for an idle row. Returns logits [B, vocab].

        rows     the arena rows: [B] int64, or an int for the first B, or None for all of them.
        columns  of the page table, as `Arena.step` takes it.
        adapters [B] int64, as `Step.adapters`.
        An idle row's logits mean nothing.
        """
        coarse = self.model.fast and tokens.shape[1] >= COARSE_FROM
        with kernels.settled(self.model.dtype, self.model.device, coarse):
            step = self.arena.step(n_new, tokens.shape[1], rows, keep="last", columns=columns)
            step.adapters = adapters
            output: Output = self.model(tokens, step, self.arena.views(rows))
            if self.listener is not None:
                self.listener(output.hidden)
            self.arena.commit(output.pending, n_new, rows)
            if tokens.shape[1] == 1:
                return self.model.logits(output.hidden[:, 0])
            return output.logits_at((n_new - 1).clamp(min=0))

    def verify(
        self, tokens: Tensor, n_new: Tensor, index: Tensor, rows: Rows = None, columns: int | None = None, adapters: Tensor | None = None
    ) -> tuple[Tensor, Pending]:
        """Feed drafts: logits [N, vocab] at the places `index` [N] int64, counted through [B, T] row by row, and the state that
        `Arena.commit` makes current for as many tokens of each row as are accepted. Arguments as in `forward`."""
        coarse = self.model.fast and tokens.shape[1] >= COARSE_FROM
        with kernels.settled(self.model.dtype, self.model.device, coarse):
            step = self.arena.step(n_new, tokens.shape[1], rows, keep="all", columns=columns)
            step.adapters = adapters
            output: Output = self.model(tokens, step, self.arena.views(rows))
            if self.listener is not None:
                self.listener(output.hidden)
            return self.model.logits(output.hidden.flatten(0, 1)[index]), output.pending
