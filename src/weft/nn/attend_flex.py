"""Sparse patterns on a GPU: FlexAttention (Dong et al. 2024) skips the blocks of scores that a mask leaves empty.

It takes the rule of a window or pattern as it is, a predicate over two positions. On a CPU it has no backward pass (torch 2.13): bands are
computed by `attend_banded` there and other patterns by `attend_blocked`.

Shapes are those of `attend_banded`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from weft.nn.step import Step
from weft.spec import Band, Pattern

MIN_WIDTH = 16  # of a head, that the kernels were written for


def suits_flex(q: Tensor) -> bool:
    """Whether the kernels take queries like these."""
    return q.device.type == "cuda" and q.dtype != torch.float64 and q.shape[-1] >= MIN_WIDTH


def block_mask(step: Step, rule: Band | Pattern) -> Any:
    """The BlockMask of one parallel pass under a rule, the same for all heads; packed documents see themselves only.

    The step's rows are whole documents or packed ones, so that a later token is never a key.
    """
    rows, length, device = step.positions.shape[0], step.length, step.positions.device
    starts = None if step.plain else torch.arange(length, device=device) - step.positions

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start: Any = 0 if starts is None else starts[b, query]
        mask: Tensor = (key >= start) & (key <= query) & rule.allows(query - start, key - start)
        return mask

    made = _on_device("create_block_mask", device.type)
    return made(seen, None if starts is None else rows, None, length, length, device=device)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, D] over k [B, T, G, D] and v [B, T, G, E] under a BlockMask.

    Returns [B, T, H, E] and the logarithm of each row's sum of exponentials, float32 (float64 stays) [B, T, H].
    """
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    mixed, aux = _on_device("flex_attention", q.device.type)(
        q,
        k,
        v,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return mixed.transpose(1, 2), aux.lse.transpose(1, 2)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """Cached, because a compiler takes another function for another program."""

    def score(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score


@cache
def _compiled(name: str) -> Callable[..., Any]:
    return torch.compile(_plain(name))


@cache
def _plain(name: str) -> Callable[..., Any]:
    from torch.nn.attention import flex_attention  # here, because it takes a second to import

    function: Callable[..., Any] = getattr(flex_attention, name)
    return function


def _on_device(name: str, device: str) -> Callable[..., Any]:
    """Compiled on a GPU, where it would else hold every score; inside compiled code, and on a CPU for tests, as it is."""
    return _compiled(name) if device == "cuda" and not torch.compiler.is_compiling() else _plain(name)
