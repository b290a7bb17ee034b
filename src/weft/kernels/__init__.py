"""Native kernels for decoding on a CPU, and the question whether they may be used.

Each has a naive twin in plain torch that says what it computes, and is only ever a faster way to the same numbers:

    quantised_linear   `weft.nn.packed.PackedWeight.multiply`
    gated_mlp          `weft.nn.channel.Gated` with packed weights
    attend             `weft.nn.rope.rotate`, a view's `write` and `read`, and `weft.nn.attend.attend_grouped`
    rms_norm           `weft.nn.norm.RMSNorm`
    silu_gate          the activation of `weft.nn.channel.Gated`
    layers             several blocks, one after another: `weft.nn.stretch`

Compiled on first use by the system's C++ compiler and kept; where there is none, or with WEFT_KERNELS=off, plain torch does the work.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("quantised_linear", "gated_mlp", "attend", "rms_norm", "silu_gate", "layers")
ops: Any = SimpleNamespace()
"""The kernels by name, once they are loaded: torch's own look-up takes a microsecond, hundreds of times a token."""


@cache
def available() -> bool:
    """Whether the kernels are loaded; the first call loads them, and compiles them if need be."""
    from weft.kernels.build import compiled_library

    path = compiled_library()
    if path is None:
        return False
    torch.ops.load_library(str(path))
    for name in NAMES:
        setattr(ops, name, getattr(torch.ops.weft_cpu, name).default)
    return True


class _Session(threading.local):
    """Between `settled` and its end: the dtype for which the question is settled, and whether products may be coarse; within `unused`
    whether the answer is no. A thread has its own: a server runs each model in one, and what one may do must not leak into another."""

    def __init__(self) -> None:  # called in each thread; in the instance, where a compiler's trace looks for what it is guarded by
        self.dtype: torch.dtype | None = None
        self.coarse = False
        self.unused = False


_session = _Session()


@contextmanager
def settled(model_dtype: torch.dtype, device: torch.device, coarse: bool = False) -> Iterator[None]:
    """Decide once for all that happens inside whether kernels are used for tensors of the model's dtype: the question costs a microsecond
    and a token asks it hundreds of times. `coarse` rounds what quantised weights are multiplied with to 8 bits instead of 16."""
    before = _session.dtype, _session.coarse
    _session.coarse = coarse
    _session.dtype = model_dtype if device.type == "cpu" and _allowed() and model_dtype in DTYPES and available() else None
    try:
        yield
    finally:
        _session.dtype, _session.coarse = before


@contextmanager
def unused() -> Iterator[None]:
    """Plain torch for all that happens inside: passes without gradients whose numbers are to be those of training, bit for bit. A kernel
    adds up in another order, which is 1e-7 of a norm and, once that is rounded to bfloat16 layer after layer, 0.07 nats of a token."""
    before = _session.unused, _session.dtype
    _session.unused, _session.dtype = True, None
    try:
        yield
    finally:
        _session.unused, _session.dtype = before


def usable(*tensors: Tensor) -> bool:
    """Whether kernels may take these tensors: on a CPU, in one of their dtypes, outside training and outside a compiler's trace."""
    dtype = tensors[0].dtype
    if dtype is _session.dtype:
        return True
    return dtype in DTYPES and _allowed() and all(t.device.type == "cpu" and t.dtype == dtype for t in tensors) and available()


def coarse() -> bool:
    """Whether quantised weights may be multiplied with activations of 8 bits."""
    return _session.coarse


def _allowed() -> bool:
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _session.unused
