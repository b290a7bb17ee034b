"""The unit that is compiled: a model together with the arena that holds its state."""

from torch import Tensor, nn

from weft.nn.arena import Arena
from weft.nn.model import Model, Output


class Runner(nn.Module):
    """Feed new tokens, commit them all, return logits after the last one. State lives in the arena's buffers, so that CUDA
    graphs may update it in place."""

    def __init__(self, model: Model, arena: Arena) -> None:
        super().__init__()
        self.model, self.arena = model, arena

    def forward(self, tokens: Tensor, n_new: Tensor, rows: Tensor | None = None) -> Tensor:
        """tokens [B, T] int64, right padded; n_new [B] valid ones a row, 0 for an idle row. Returns logits [B, vocab].

        rows [B] int64 names the arena rows; None means all of them in order. An idle row's logits mean nothing.
        """
        step = self.arena.step(n_new, tokens.shape[1], rows, keep="last")
        output: Output = self.model(tokens, step, self.arena.views(rows))
        self.arena.commit(output.pending, n_new, rows)
        return output.logits_at((n_new - 1).clamp(min=0))
