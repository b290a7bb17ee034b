"""What an adapter knows of the model it was trained upon, so that it is not put on another by mistake."""

import hashlib
import os
from pathlib import Path

import torch

from weft.errors import UserError
from weft.nn import Model
from weft.weights.hub import find_model, list_models
from weft.weights.hub_names import repo_of


def identity(model: Model) -> str:
    """A fingerprint of a model's weights, its adapter apart: SHA-256 over sizes and norms in bfloat16.

    Norms are what every copy of a model keeps as it is, in whatever numbers its matrices are stored, and what training of the whole model
    moves. So a quantised copy has the fingerprint of the original, and a fine-tuned one has another.
    """
    digest = hashlib.sha256(f"{model.spec.dim} {len(model.blocks)}".encode())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name and ".adapter." not in name:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def written_base(source: str) -> str:
    """How a file names a base: a path in full, a pulled model by the repo that its name stands for, which PEFT knows too."""
    return os.path.abspath(source) if Path(source).expanduser().exists() else repo_of(source) or source


def find_base(named: str | None, folder: Path) -> str:
    """The base that an adapter's config names: a path from the adapter's folder or from here, a pulled model's name, or the repo that its
    name stands for or that it was pulled from. Raises UserError that says what to do where it is not on this machine."""
    remedy = f"Name the base yourself: give the model with --adapter {folder}"
    if not named:
        raise UserError(f"{folder} is an adapter whose adapter_config.json names no base. {remedy}.")
    for path in (folder / named, Path(named).expanduser()):
        if path.exists() and path.resolve() != folder.resolve():
            return str(path)
    try:
        find_model(named)
    except UserError:
        pulled = next((model.name for model in list_models() if named in (repo_of(model.name), model.source.removeprefix("hub:"))), None)
        if pulled is None:
            raise UserError(
                f"{folder} is an adapter for {named}, which is no path and has not been pulled. Run `weft pull {named}`. {remedy}."
            ) from None
        return pulled
    return named
