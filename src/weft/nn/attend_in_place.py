"""Attention by kernels that read state where it lies: the incremental form on a CPU, for every length of a pass alike.

The naive twin is what `Attention.forward` does without it: `rotate`, the views' `write` and `read`, `allowed`, `attend_grouped`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft import kernels
from weft.nn.step import Step
from weft.nn.views import View

WIDTHS = (16, 32, 48, 64, 96, 128, 256)  # of a head, that the kernel was compiled for


class AttendSettings(NamedTuple):
    """heads of queries, the factor on scores, and the window and soft cap, 0 where there are none."""

    heads: int
    scale: float
    window: int
    softcap: float


def can_attend_in_place(heads: Tensor, *views: Any) -> bool:
    """Whether the kernels take heads [B, T, H + 2 G, D] and the state behind these views."""
    if heads.shape[-1] not in WIDTHS or not kernels.usable(heads):
        return False
    return all(view.dtype in kernels.DTYPES for view in views)


def attend_in_place(
    heads: Tensor, tables: tuple[Tensor | None, Tensor | None], keys: View, values: View, step: Step, settings: AttendSettings
) -> Tensor:
    """Write this pass's keys and values into state and attend to all that a query may see; returns [B, T, H, D].

    heads   [B, T, H + 2 G, D]: queries, keys and values before rotation.    tables  cos and sin, or None twice.
    Scores, softmax and sums are float32. A query's result does not depend on the other queries or rows.
    """
    at = keys.locate(step)
    asked = asked_positions(step)
    mixed: Tensor = kernels.ops.attend(
        heads, *tables, settings.heads, keys.buffer, values.buffer, at.head_stride, at.head_stride,
        at.slots, at.starts, at.positions, asked, settings.scale, settings.window, settings.softcap,
    )  # fmt: skip
    return mixed


def asked_positions(step: Step) -> Tensor:
    """[B, T] int64: the position of every query, -1 for padding, which asks for nothing."""
    return step.once("asked positions", lambda: torch.where(step.valid, step.positions, -1))
