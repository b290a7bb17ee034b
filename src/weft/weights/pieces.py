"""Reading stored numbers into tensors piece by piece, so that loading needs little memory beyond the model itself.

Files are read with plain reads into memory we own. A mapped file would do as well for speed, but every page of it that was touched
counts as resident memory of the process until the map is closed.
"""

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from weft.errors import UserError

# Numbers converted at a time: 1 MB of float32, which stays in a core's cache through the steps of a dequantisation.
PIECE = 2**18


def open_binary(path: Path) -> FileIO:
    """Open for unbuffered reading; raises UserError where the file went missing."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def read_bytes_into(file: FileIO, offset: int, out: Tensor) -> None:
    """Fill a contiguous CPU tensor of any dtype with the bytes found at `offset`; raises UserError where the file ends early."""
    assert out.is_contiguous()
    assert out.device.type == "cpu"
    if out.numel() == 0:
        return
    memory = out.detach().view(-1).view(torch.uint8).numpy().data
    file.seek(offset, os.SEEK_SET)
    done = 0
    while done < len(memory):
        # `buffering=0` gives a raw file, whose readinto may stop early; Linux also stops at 2 GB.
        count = file.readinto(memory[done : done + 2**30])
        if not count:
            raise UserError(f"{file.name} ended at byte {offset + done}, before the tensor did. Fetch the file again.")
        done += count


@torch.no_grad()
def fill(out: Tensor, read: Callable[[int, int], Tensor], start: int = 0) -> None:
    """Copy numbers into `out` in its row-major order, whatever its strides, dtype and device.

    out    the tensor to fill; a transposed or sliced view is fine.
    read   read(start, count) returns `count` numbers [count] from the `start`-th on. Pieces begin and end at rows, or, in a tensor of
           one axis, at multiples of PIECE, so that storage in blocks is never cut inside one.
    start  the number to begin with.
    """
    if out.numel() == 0:
        return
    if out.dim() == 0:
        out.copy_(read(start, 1)[0])
        return
    row = out[0].numel()
    if row > PIECE and out.dim() > 1:
        for index in range(out.shape[0]):
            fill(out[index], read, start + index * row)
        return
    rows = max(1, PIECE // row)
    for first in range(0, out.shape[0], rows):
        part = out[first : first + rows]
        part.copy_(read(start + first * row, part.numel()).view(part.shape))
