"""A model read in fewer bits than it is stored in: each matrix is rounded once it has been read, so that the float model is never whole in
memory."""

import torch

from weft.errors import UserError
from weft.nn import Model, build, materialise
from weft.nn.compact import compact
from weft.nn.packed import PackedWeight
from weft.quant.rounding import round_to_nearest
from weft.spec import ModelSpec, Quant
from weft.weights.load import Checkpoint
from weft.weights.map import TensorReader, stored_state


@torch.no_grad()
def load_quantised(checkpoint: Checkpoint, quant: Quant, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model of a checkpoint with its matrices in the form `quant` says, to the nearest level; `dtype` is that of the rest.

    Raises UserError for a model that is quantised already in Weft's own format, for one that this form has no place in, and as
    `load_weights` does.
    """
    if checkpoint.spec.quant is not None:
        raise UserError(f"{checkpoint.path} is quantised to {checkpoint.spec.quant.type} already; give the model it was made from.")
    # What is rounded is read in float32 whatever the rest is kept in: in fewer bits some weights would fall to another level.
    plain = build(checkpoint.spec, "meta", torch.float64 if dtype == torch.float64 else torch.float32)
    spec = ModelSpec.model_validate({**checkpoint.spec.model_dump(), "quant": quant})
    model = materialise(build(spec, "meta", dtype), device)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    if not any(name.startswith("blocks.") for name in packed):
        raise UserError(
            f"no matrix inside the layers of {checkpoint.path} has rows of a multiple of {quant.group} weights, so none can be stored in "
            f"{quant.type}; leave quantize out."
        )
    rest = stored_state(model)
    prefix = "" if checkpoint.is_gguf else checkpoint.family.prefix
    reader = TensorReader(stored_state(plain), checkpoint.rules(plain), checkpoint.files, prefix, str(checkpoint.path))
    for name in reader.names:
        tensor = reader.read(name)
        if name in packed:
            packed[name].fill(*round_to_nearest(tensor.flatten(0, -2).to(device), packed[name].quant))
        else:
            rest[name].copy_(tensor)
    compact(model)
    return model.eval()
