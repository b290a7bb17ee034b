"""Which device and which number format a command runs in."""

from typing import TYPE_CHECKING

from weft.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def pick_device(name: str = "auto") -> "torch.device":
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device; `auto` takes an accelerator where there is one."""
    import torch

    kind = name.split(":")[0]
    if kind not in DEVICES:
        raise unknown("device", name, DEVICES)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        usable = ", ".join(device for device, works in available.items() if works)
        raise UserError(f"device '{name}' is not available here; usable: {usable}. Give one of these, or auto.")
    return torch.device(name)


def pick_dtype(name: str = "auto", device: "torch.device | None" = None) -> "torch.dtype":
    """Turn a dtype's name into the dtype; `auto` is bfloat16 (float16 on mps)."""
    import torch

    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    if name == "auto":
        return torch.float16 if device is not None and device.type == "mps" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype
