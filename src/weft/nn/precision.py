"""In which numbers things are computed: products in autocast's where it is on, sums in float32 or wider."""

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """In which numbers a product with x is computed: autocast's where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
