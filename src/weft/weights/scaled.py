"""Checkpoints of 8-bit floats in blocks, read as if they held 16-bit ones."""

from pathlib import Path

import torch
from torch import Tensor

from weft.errors import UserError
from weft.weights.files import TensorFiles

SUFFIX = "_scale_inv"


class ScaledFiles(TensorFiles):
    """A folder whose matrices are float8_e4m3, with a float32 factor for each block of rows and columns in a tensor of their own, whose
    name ends in `_scale_inv` (DeepSeek-AI 2024b, section 3.3.2). Such a matrix is handed out as bfloat16, its factors not at all.

    Raises UserError where a matrix has no factors, or factors of another shape.
    """

    def __init__(self, path: str | Path, block: tuple[int, int]) -> None:
        super().__init__(path)
        self.block = block
        self._scaled = {name for name in super().names if super(ScaledFiles, self).dtype(name) == torch.float8_e4m3fn}
        for name in sorted(self._scaled):
            expected = tuple(-(-size // step) for size, step in zip(self.shape(name), block, strict=False))
            if name + SUFFIX not in self or self.shape(name + SUFFIX) != expected or len(self.shape(name)) != 2:
                raise UserError(
                    f"{self.path}: {name} is a matrix of 8-bit floats and needs factors {name + SUFFIX} for blocks of "
                    f"{block[0]}x{block[1]}, which are missing or of another shape. Fetch the model again."
                )

    @property
    def names(self) -> list[str]:
        return [name for name in super().names if name.removesuffix(SUFFIX) not in self._scaled or name in self._scaled]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._scaled else super().dtype(name)

    @torch.no_grad()
    def read_into(self, name: str, out: Tensor) -> None:
        """As `TensorFiles.read_into`; of a scaled matrix its codes are held beside `out`."""
        if name not in self._scaled:
            super().read_into(name, out)
            return
        codes = torch.empty(self.shape(name), dtype=torch.float8_e4m3fn)
        super().read_into(name, codes)
        factors = super().read(name + SUFFIX, torch.float32)
        rows, columns = self.block
        for i, factor in enumerate(factors):
            wide = codes[i * rows : (i + 1) * rows].float()
            out[i * rows : (i + 1) * rows].copy_(wide * factor.repeat_interleave(columns)[: wide.shape[1]])
