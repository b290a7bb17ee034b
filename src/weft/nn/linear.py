"""The affine map every part uses, with the initialisation of its place in the model."""

from torch import nn

from weft.nn.fill import fill_normal


class Linear(nn.Linear):
    """y = x W^T + b; W is drawn from N(0, std^2) and b starts at zero."""

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        fill_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
