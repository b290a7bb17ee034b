"""The activations a channel may name. `gelu` is exact, `relu2` the square of ReLU."""

from typing import Literal

Activation = Literal["relu", "gelu", "gelu_tanh", "relu2", "silu"]
