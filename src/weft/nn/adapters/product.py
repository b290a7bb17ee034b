"""A frozen linear map and its changes of low rank as one step of training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.nn.linear import affine
from weft.nn.packed import PackedWeight

Rows = Sequence[tuple[int, int]]
"""Of each change, the first of the map's rows that it changes and the row after the last."""


def adapted_product(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, factors: Sequence[tuple[Tensor, Tensor]], rows: Rows, scale: float
) -> Tensor:
    """x W^T + b, and on the rows of each change scale x A^T B^T: x [..., in] in the dtype of the products, factors A [rank, in] and
    B [rows, rank] in any, W and b frozen.

    The naive twin is `LoRAAdapter`'s other path: a product for the map, one for all A and one for all B, the latter filled up with zeros.
    Here each change is added where it belongs, in place, and its gradient is added to that of the map in place too.
    """
    y: Tensor = _Adapted.apply(x, weight, bias, tuple(rows), scale, *(tensor for pair in factors for tensor in pair))
    return y


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None, rows: Rows, scale: float, *factors: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        a = torch.cat(factors[::2]).to(x.dtype)
        y = affine(flat, _whole(weight, x.dtype), None if bias is None else bias.to(x.dtype))
        z = affine(flat, a)
        for (first, end), own, b in zip(rows, z.split([b.shape[1] for b in factors[1::2]], 1), factors[1::2], strict=True):
            y[:, first:end].addmm_(own, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(flat, z, a, *factors[1::2])
        ctx.weight, ctx.rows, ctx.scale, ctx.shape, ctx.dtype = weight, rows, scale, x.shape, factors[0].dtype
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        flat, z, a, *bs = ctx.saved_tensors
        dy = outer[0].flatten(0, -2)
        ranks = [b.shape[1] for b in bs]
        dz, gradients = torch.empty_like(z), []
        for (first, end), own, b, place in zip(ctx.rows, z.split(ranks, 1), bs, dz.split(ranks, 1), strict=True):
            part = dy[:, first:end]
            place.copy_(part @ (b * ctx.scale).to(dy.dtype))
            gradients.append((part.t() @ own).to(ctx.dtype) * ctx.scale)
        da = (dz.t() @ flat).to(ctx.dtype).split(ranks)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ _whole(ctx.weight, dy.dtype)).addmm_(dz, a).view(ctx.shape)
        return dx, None, None, None, None, *(gradient for pair in zip(da, gradients, strict=True) for gradient in pair)


def _whole(weight: Any, dtype: torch.dtype) -> Tensor:
    """A weight in full, in the dtype of the products; one in fewer bits is written out anew each time."""
    whole: Tensor = weight.dequantise(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)
    return whole
