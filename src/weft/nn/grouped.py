"""Products of rows with a matrix each of several: the arithmetic of a mixture of experts.

Rows come sorted by the matrix they meet. How many rows a matrix has is data, so a compiler sees one operation with static shapes.
torch's own `grouped_mm` does the same where it is quick, on CUDA in 16 bits; on a CPU it takes twice the time of the loop here, and has
no float64.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.nn.linear import affine
from weft.nn.packed import PackedWeight

ROWS_ALIKE = 32  # of fewer rows `affine` sees to it that they come out as among many


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row i of x [M, D] times the transpose of its own matrix of weight [E, O, D], as [M, O].

    ends [E] int32: rows ends[e - 1] ... ends[e] - 1 belong to matrix e. Rows from the last end on belong to none and give zeros.
    """
    if x.is_cuda and x.dtype.itemsize == 2 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0 and hasattr(F, "grouped_mm"):
        return torch_grouped_linear(x, weight, ends)
    y: Tensor = _product(x, weight, ends, False)
    return y


def torch_grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_linear` by torch's operation, which takes sizes of whole 16 bytes and leaves unset what belongs to no matrix: rows of the
    result, and of the gradient of x."""
    nobodys = (torch.arange(x.shape[0], device=x.device) >= ends[-1])[:, None]
    return F.grouped_mm(x.masked_fill(nobodys, 0), weight.transpose(1, 2), offs=ends).masked_fill(nobodys, 0)


def naive_grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition, row by row; the twin that `grouped_linear` is tested against."""
    owners = [sum(row >= end for end in ends.tolist()) for row in range(x.shape[0])]
    nothing = x.new_zeros(weight.shape[1])
    return torch.stack([weight[owner] @ row if owner < len(weight) else nothing for row, owner in zip(x, owners, strict=True)])


def _slices(stops: list[int]) -> list[tuple[int, int, int]]:
    """(matrix, first row, row after the last) of the matrices that have rows."""
    starts = [0, *stops[:-1]]
    return [(e, start, stop) for e, (start, stop) in enumerate(zip(starts, stops, strict=True)) if stop > start]


@torch.library.custom_op("weft::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """x_e W_e^T group by group, or x_e W_e where `transposed`. In 16 bits a row's result does not depend on the other rows (`affine`)."""
    y = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
    stops: list[int] = ends.tolist()
    y[stops[-1] :] = 0
    for e, start, stop in _slices(stops):
        if transposed or stop - start >= ROWS_ALIKE:
            torch.mm(x[start:stop], weight[e] if transposed else weight[e].t(), out=y[start:stop])
        else:
            y[start:stop] = affine(x[start:stop], weight[e])
    return y


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


def grouped_packed_linear(x: Tensor, weight: PackedWeight, ends: Tensor) -> Tensor:
    """`grouped_linear` for matrices in 4 or 8 bits, one below the other. It looks at `ends`, and so is no part of a compiled graph."""
    each = weight.shape[0] // ends.shape[0]
    stops: list[int] = ends.tolist()
    parts = [weight.part(e * each, each, x[start:stop]) for e, start, stop in _slices(stops)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - stops[-1], each)])


@torch.library.custom_op("weft::grouped_outer", mutates_args=())
def _outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy_e^T x_e group by group, [E, O, D]: the gradient of the weights."""
    gradient = x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])
    found = _slices(ends.tolist())
    if len(found) < ends.shape[0]:
        gradient.zero_()
    for e, start, stop in found:
        torch.mm(dy[start:stop].t(), x[start:stop], out=gradient[e])
    return gradient


@_outer.register_fake
def _(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    x, weight, ends, transposed = inputs
    assert not transposed, "the transposed product is a gradient and has none of its own"
    ctx.save_for_backward(x, weight, ends)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    dy = dy.contiguous()
    dx = _product(dy, weight, ends, True) if ctx.needs_input_grad[0] else None
    return dx, _outer(dy, x, ends) if ctx.needs_input_grad[1] else None, None, None


_product.register_autograd(_gradients, setup_context=_keep)


class _Dispatch(torch.autograd.Function):
    """x[order // k]: a row for each choice of each token. Its gradient is read through the inverse permutation, not added up row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return outer[0][inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """rows[inverse]; its gradient is the other permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return outer[0][order], None, None


class Assignment:
    """Which row goes where: the choices of all tokens, sorted by expert and, within one, by token. Those of padding come last and meet
    none, so that what padding holds cannot change how many rows are multiplied together.

    chosen [N, k] int64, valid [N]; `ends` [E] int32 as `grouped_linear` takes them.
    """

    def __init__(self, chosen: Tensor, valid: Tensor, experts: int) -> None:
        self.k = chosen.shape[1]
        keys = torch.where(valid[:, None], chosen, experts).flatten()
        narrow = keys.to(torch.uint8) if experts < 256 else keys  # a byte sorts in half the time
        ordered, self.order = torch.sort(narrow, stable=True)
        places = torch.arange(keys.shape[0], device=keys.device)
        self.inverse = torch.empty_like(self.order).scatter_(0, self.order, places)
        self.ends = torch.searchsorted(ordered.long(), torch.arange(experts, device=keys.device), right=True).int()

    def dispatch(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N k, D], a row a choice, sorted."""
        rows: Tensor = _Dispatch.apply(x, self.order, self.inverse, self.k)
        return rows

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """[N k, D] sorted -> [N, D]: each token's rows, weighted by weights [N, k] and summed in their dtype."""
        own: Tensor = _Permute.apply(rows, self.order, self.inverse)
        return (own.unflatten(0, (-1, self.k)) * weights[..., None]).sum(1)
