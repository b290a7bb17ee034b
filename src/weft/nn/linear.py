"""The affine map every part uses, with the initialisation of its place in the model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.fill import fill_normal
from weft.nn.packed import ROWS, PackedWeight, TiledWeight
from weft.nn.packed_nf4 import DoubleNF4Weight
from weft.spec.quant import GROUP, Quant


class Linear(nn.Linear):
    """y = x W^T + b; W is drawn from N(0, std^2) and b starts at zero. In a quantised model `weight` is a `PackedWeight`.

    `adapter`, where there is one, computes in its stead what the map and its change give together: adapter(x, self).
    """

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias)
        self.adapter: nn.Module | None = None

    def reset_parameters(self) -> None:
        if isinstance(self.weight, Tensor):
            fill_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def packed(self) -> bool:
        """Whether the weight is quantised."""
        return isinstance(self.weight, PackedWeight)

    def take_off(self) -> None:
        """Be without an adapter again."""
        del self.adapter  # first, so that the module list forgets the name
        self.adapter = None

    def forward(self, input: Tensor) -> Tensor:
        if self.adapter is not None:
            y: Tensor = self.adapter(input, self)
            return y
        return affine(input, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x [..., D]; in 16-bit formats on a CPU, a row of x gives the same bits however many other rows there are.

    Torch has three reasons to compute a row in another way, and each is taken away: a kernel for a single row, which divides long sums
    differently; a kernel for products of at most 16^3; and for x [B, T, D] that is not contiguous, a bias added after rounding. A few
    rows are therefore given company (5 microseconds).
    """
    if isinstance(weight, PackedWeight):
        return weight.multiply(x, bias)
    rows = x.numel() // x.shape[-1]
    fewest = max(2, 16**3 // weight.numel() + 1)
    if x.dtype.itemsize == 2 and x.device.type == "cpu" and rows < fewest:
        padded = F.pad(x.reshape(rows, -1), (0, 0, 0, fewest - rows))
        return F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], -1)
    return F.linear(x.contiguous(), weight, bias)


def row_squares(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    """The squared length of every row of a weight, [out] in a wide dtype."""
    wide: Tensor = weight.dequantise(dtype) if isinstance(weight, PackedWeight) else weight.detach().to(dtype)
    return wide.square().sum(-1)


def pack_structure(model: nn.Module, quant: Quant) -> None:
    """Put empty packed weights where `quant` wants them: every `Linear` whose rows divide into groups, the tables of tokens, and stacked
    matrices [E, R, C] (`stacked` names a module's), one below the other, where theirs divide too and R into the kernel's tiles.
    """
    for module in list(model.modules()):
        for name in getattr(module, "stacked", ()):
            experts, rows, columns = getattr(module, name).shape
            if columns % quant.group == 0 and rows % ROWS == 0:
                delattr(module, name)
                setattr(module, name, packed_weight(experts * rows, columns, quant))
        if isinstance(module, Linear) and module.in_features % quant.group == 0:
            _replace(module, packed_weight(module.out_features, module.in_features, quant))
        elif quant.table != "float" and getattr(module, "is_table", False) and isinstance(module.weight, Tensor):
            rows, columns = module.weight.shape
            if columns % GROUP == 0:
                _replace(module, TiledWeight(rows, columns, quant.table))


def num_plain(module: nn.Module) -> int:
    """Matrices of a module's own that `pack_structure` would pack but for their sizes, and has not."""
    names = ("weight",) if isinstance(module, Linear) else getattr(module, "stacked", ())
    return sum(isinstance(getattr(module, name), Tensor) for name in names)


def packed_weight(rows: int, columns: int, quant: Quant) -> PackedWeight:
    """An empty weight of a format."""
    return DoubleNF4Weight(rows, columns, quant) if quant.double else TiledWeight(rows, columns, quant.type, quant.minimum)


def _replace(module: nn.Module, packed: PackedWeight) -> None:
    del module.weight
    module.weight = packed
