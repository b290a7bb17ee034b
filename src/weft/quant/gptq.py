"""GPTQ (Frantar et al. 2023, algorithm 1): columns are rounded one after the other, and what a column loses on the calibration text is
made good, as far as least squares can, by those still to come."""

import torch
from torch import Tensor

from weft.quant.rounding import Codes, Levels, as_codes, fit
from weft.spec.quant import Quant

DAMPING = 0.01  # of the mean diagonal, added to it: inputs that never vary would make the system singular


def round_with_compensation(weight: Tensor, inputs: Tensor, quant: Quant) -> Codes:
    """Codes of a matrix [rows, columns] for inputs whose second moments, sum of x x^T, are `inputs` [columns, columns].

    Minimises |W x - W' x|^2 over the calibration text greedily, column by column, with the levels of a group fitted when it is reached.
    """
    rest = weight.float().t().contiguous()  # columns of W as rows: each is read and changed whole
    factor = _inverse_factor(inputs.float())
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    scales, minima = [], []
    for start in range(0, len(rest), quant.group):
        end = start + quant.group
        levels = fit(rest[start:end].t(), quant)
        by_row = Levels(quant, levels.scale[:, 0], None if levels.minimum is None else levels.minimum[:, 0])
        errors = torch.empty_like(rest[start:end])
        for column in range(start, end):
            codes[column] = by_row.codes(rest[column])
            errors[column - start] = (rest[column] - by_row.values(codes[column])) / factor[column, column]
            rest[column + 1 : end] -= factor[column, column + 1 : end, None] * errors[column - start]
        rest[end:] -= factor[start:end, end:].t() @ errors
        scales.append(levels.scale)
        minima.append(levels.minimum)
    minimum = None if minima[0] is None else torch.stack([m for m in minima if m is not None], 1)
    return as_codes(codes.t().unflatten(1, (-1, quant.group)), Levels(quant, torch.stack(scales, 1), minimum))


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments (section 3.3, step 3)."""
    dead = moments.diagonal() == 0
    damped = moments + torch.diag_embed(dead.float() + DAMPING * moments.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped.double())), upper=True).float()
