"""Several processes that train one model, each on its share of every batch. Started by torchrun; alone, everything here does nothing."""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.errors import UserError

BUCKET_BYTES = 1 << 25


class World:
    """This process among all: `rank` of `size`. Gradients are summed, never averaged: terms are already divided by global counts."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum `.grad` over all processes, a few large messages at a time; a missing gradient counts as zeros."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        held = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (held + parameter.grad.nbytes > BUCKET_BYTES or bucket[0].dtype != parameter.grad.dtype):
                _sum_together(bucket)
                bucket, held = [], 0
            bucket.append(parameter.grad)
            held += parameter.grad.nbytes
        if bucket:
            _sum_together(bucket)

    def lead(self, value: float) -> float:
        """The value that the leading process gave."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(tensor, 0)
        return float(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, in order of rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


def _sum_together(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def join_world(device: str) -> World:
    """The processes that torchrun started, by its environment variables; a world of one without it.

    device  "cpu", "cuda" or "auto". Control messages travel between CPUs, gradients between devices.
    Raises UserError where torchrun started more processes than there are GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if cuda:
            local, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= present:
                raise UserError(f"torchrun started process {local} on a machine with {present} GPUs; give --nproc-per-node {present}.")
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return World(dist.get_rank(), dist.get_world_size())
