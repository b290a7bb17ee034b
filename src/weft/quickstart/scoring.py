"""What a model needs for held-out text, in bits a byte, on the scale of the compressors."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from weft.nn import Model
from weft.objectives.cross_entropy import linear_cross_entropy
from weft.objectives.head import head_of

Progress = Callable[[float, float], None]  # done, of how much
ROWS = 16  # windows scored at once


class Score(NamedTuple):
    """The cost of a text: `nats` for `tokens` scored tokens that stand for `num_bytes` bytes of UTF-8."""

    nats: float
    tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


def windows(count: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, stop, first) of windows over a stream of `count` tokens: tokens start … stop - 1 are read, those from `first` on are
    scored. Together they score tokens 1 … count - 1 once each; all but the first window's have `length - stride` or more to look back on.
    """
    assert 0 < stride <= length
    cut = [(0, min(count, length + 1), 1)]
    while cut[-1][1] < count:
        stop = min(count, cut[-1][1] + stride)
        cut.append((max(0, stop - length - 1), stop, cut[-1][1]))
    return cut


def score_stream(
    model: Model, stream: np.ndarray, num_bytes: int, length: int, stride: int, dtype: torch.dtype, progress: Progress | None = None
) -> Score:
    """Score a stream of tokens [N] by its probability under the model, every token but the first once.

    length   tokens a window, the length that the model was trained on.      stride   tokens a window scores after the first.
    dtype    of the products; sums are in float32 or wider.
    End marks are scored too and stand for no bytes: a decoder must learn where a file ends.
    """
    device = next(model.parameters()).device
    cut = windows(len(stream), length, stride)
    nats, tokens = 0.0, 0
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for first in range(0, len(cut), ROWS):
            inputs, targets, mask = (tensor.to(device) for tensor in _rows(stream, cut[first : first + ROWS], length))
            hidden = model(inputs).hidden.flatten(0, 1)
            nats += float(linear_cross_entropy(hidden, head_of(model), targets.flatten(), mask.flatten()).nll)
            tokens += int(mask.sum())
            if progress is not None:
                progress(min(first + ROWS, len(cut)), len(cut))
    assert tokens == len(stream) - 1
    return Score(nats, tokens, num_bytes)


def _rows(stream: np.ndarray, cut: Sequence[tuple[int, int, int]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets int64, mask bool, each [windows, length]; padding on the right is read after everything that is scored."""
    inputs, targets = (torch.zeros(len(cut), length, dtype=torch.int64) for _ in range(2))
    mask = torch.zeros(len(cut), length, dtype=torch.bool)
    for row, (start, stop, first) in enumerate(cut):
        window = torch.from_numpy(stream[start:stop])
        inputs[row, : stop - start - 1], targets[row, : stop - start - 1] = window[:-1], window[1:]
        mask[row, first - start - 1 : stop - start - 1] = True
    return inputs, targets, mask
