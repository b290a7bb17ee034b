"""What one forward pass is told besides its tokens: where each row stands, what is new, what belongs together."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from weft.spec import Pattern

Keep = Literal["all", "last"]
V = TypeVar("V")


class Step:
    """Metadata of one forward pass, computed once and handed to every layer. Ints and bools only.

    start      [B] int64   tokens of each row committed before this pass.
    n_new      [B] int64   valid tokens of this pass; 0 marks an idle row.
    positions  [B, T]      absolute position of every token; position 0 means fresh state.
    valid      [B, T]      bool, False on right padding.
    segments   [B, T]      document number in packed training, or None: tokens attend within their segment only.
    rows       [B]         arena rows this pass works on, or None for the first B rows in order.
    table      [B, pages]  page numbers of a paged arena, cut to the columns that this pass can reach, or None.
    memory     (entries [B, S, M], lengths [B]) for cross-attention without an arena, or None.
    noise      [B, T] half-width of uniform noise on the token vectors in training (NEFTune), or None.
    keep       "all" returns a recurrent state for every token (verification), "last" only after the last valid one.
    adapters   [B] int64, which of several adapters a row has: 0 none, k the k-th; None in a model that has no more than one.
    virtual    [B, T] int64, the number of a virtual token, negative for tokens of the vocabulary; None in a model without such tokens.
    plain      static: every row is one document from position 0 with only right padding, so fused kernels apply.

    A plain class on purpose: FSDP2 casts floats it finds in dataclasses, tuples and dicts.
    """

    def __init__(
        self,
        start: Tensor,
        n_new: Tensor,
        length: int,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        rows: Tensor | None = None,
        table: Tensor | None = None,
        keep: Keep = "all",
        plain: bool = False,
    ) -> None:
        steps = torch.arange(length, device=start.device)
        self.start, self.n_new, self.length = start, n_new, length
        self.positions = start[:, None] + steps if positions is None else positions
        self.valid = steps < n_new[:, None]
        self.segments, self.rows, self.table, self.keep, self.plain = segments, rows, table, keep, plain
        self.memory: tuple[Tensor, Tensor] | None = None
        self.noise: Tensor | None = None
        self.adapters: Tensor | None = None
        self.virtual: Tensor | None = None
        self._memo: dict[Any, Any] = {}

    @classmethod
    def parallel(cls, tokens: Tensor, lengths: Tensor | None = None) -> "Step":
        """The training pass over unpacked rows [B, T]: each row one document of `lengths` [B] tokens, right padded."""
        batch, length = tokens.shape
        start = torch.zeros(batch, dtype=torch.long, device=tokens.device)
        n_new = torch.full_like(start, length) if lengths is None else lengths
        return cls(start, n_new, length, plain=True)

    @classmethod
    def packed(cls, positions: Tensor, segments: Tensor, lengths: Tensor | None = None) -> "Step":
        """The training pass over packed rows: positions [B, T] restart at 0 with every document, segments [B, T] number them; `lengths` [B]
        tokens come before padding, which is a segment of its own.
        """
        batch, length = positions.shape
        start = torch.zeros(batch, dtype=torch.long, device=positions.device)
        n_new = torch.full_like(start, length) if lengths is None else lengths
        return cls(start, n_new, length, positions=positions, segments=segments)

    def once(self, key: Any, compute: Callable[[], V]) -> V:
        """Return `compute()`, evaluated once a pass for each key: masks and rotary tables are shared between layers."""
        if key not in self._memo:
            self._memo[key] = compute()
        value: V = self._memo[key]
        return value


def allowed(step: Step, key_positions: Tensor, window: int | None = None, pattern: Pattern | None = None) -> Tensor:
    """The one mask rule of causal attention: bool [B, T, K], True where a query may look at a key.

    key_positions [B, K] are absolute; negative ones mark empty slots. Causal is 0 <= key <= query, a window adds
    query - key < window, a sparse pattern its own rule (`weft.spec.patterns`). In packed training keys are this pass's own tokens, and
    their segment must be the query's.
    """
    query, key = step.positions[:, :, None], key_positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    if step.segments is not None:
        mask = mask & (step.segments[:, :, None] == step.segments[:, None, :])
    if pattern is not None:
        mask = mask & pattern.allows(query, key)
    return mask if window is None else mask & (query - key < window)
