"""A model fed through decode state, pass by pass."""

import torch

from weft import kernels
from weft.nn import Arena


def in_passes(model, tokens, sizes, state=None, page=None, coarse=False):
    """Logits [B, T, V] of tokens fed in passes of these sizes, and the arena they went through."""
    rows, length = tokens.shape
    arena, parts, at = Arena(model, rows, length, max(sizes), dtype=state, page=page), [], 0
    with torch.no_grad(), kernels.settled(model.dtype, model.device, coarse):
        for size in sizes:
            arena.reserve(dict.fromkeys(range(rows), at + size))
            n_new = torch.full((rows,), size)
            output = model(tokens[:, at : at + size], arena.step(n_new, size), arena.views())
            arena.commit(output.pending, n_new)
            parts.append(output.logits)
            at += size
    return torch.cat(parts, 1), arena
