"""The linear recurrence h_t = a_t * h_{t-1} + b_t over axis 1: a loop to read, and a parallel form to run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 32


def scan_naive(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """One token after another. a, b [B, T, *]; before [B, *] is the state ahead of the chunk. Returns every h, [B, T, *]."""
    states, state = [], before
    for t in range(a.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    return torch.stack(states, 1)


def linear_scan(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """The same by doubling inside chunks of 32 tokens and a loop over the chunks: log2(32) passes instead of T steps.

    Equal to `scan_naive` up to rounding. The value at t depends on tokens up to t alone, bit for bit, whatever follows it, so
    padding is inert. The gradient is one more scan, backwards; only a and h are kept for it.
    """
    if a.shape[1] == 1:
        return a * before[:, None] + b
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] = _LinearScan.apply
    return apply(a, b, before)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, before: Tensor) -> Tensor:
        h = _chunked(a, b, before)
        ctx.save_for_backward(a, h, before)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With g_t the gradient of h_t as the loss sees it, db_t = g_t + a_{t+1} db_{t+1}: the recurrence read from the end."""
        a, h, before = ctx.saved_tensors
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        grad_b = _chunked(following.flip(1), grad.flip(1), torch.zeros_like(before)).flip(1)
        previous = torch.cat([before[:, None], h[:, :-1]], 1)
        return grad_b * previous, grad_b, a[:, 0] * grad_b[:, 0]


def _chunked(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    batch, length, *rest = a.shape
    chunks = -(-length // CHUNK)
    room = chunks * CHUNK - length
    if room:  # a = 1, b = 0 leaves the state as it is
        a = torch.cat([a, a.new_ones(batch, room, *rest)], 1)
        b = torch.cat([b, b.new_zeros(batch, room, *rest)], 1)
    a, b = a.reshape(batch, chunks, CHUNK, *rest), b.reshape(batch, chunks, CHUNK, *rest)
    shift = 1
    while shift < CHUNK:  # entry t absorbs the 2^k entries before it
        b = torch.cat([b[:, :, :shift], b[:, :, shift:] + a[:, :, shift:] * b[:, :, :-shift]], 2)
        a = torch.cat([a[:, :, :shift], a[:, :, shift:] * a[:, :, :-shift]], 2)
        shift *= 2
    carries, state = [], before
    for chunk in range(chunks):
        carries.append(state)
        state = b[:, chunk, -1] + a[:, chunk, -1] * state
    h = b + a * torch.stack(carries, 1)[:, :, None]
    return h.reshape(batch, chunks * CHUNK, *rest)[:, :length]
