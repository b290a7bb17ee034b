"""Opens a model: a folder in Hugging Face layout, a folder of ours, or a GGUF file."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic
import torch

from weft.errors import UserError
from weft.files import read_text
from weft.nn import Model, build, materialise
from weft.nn.compact import compact
from weft.spec import ModelSpec, Quant
from weft.weights.adapter_base import find_base
from weft.weights.adapter_files import StoredAdapter, is_adapter, put_adapter, read_adapter
from weft.weights.files import TensorFiles
from weft.weights.gguf import GGUF, read_gguf
from weft.weights.gguf_packed import fill_packed, stored_quant
from weft.weights.hub import find_model
from weft.weights.map import TensorSource, identity_rules, load_tensors, stored_state
from weft.weights.scaled import ScaledFiles
from weft.zoo import FAMILIES, Family, from_config, held, llama_gguf, rules_of
from weft.zoo.config import scaled_blocks
from weft.zoo.family import explained
from weft.zoo.rules import Rule


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose description has been read and checked, its weights not yet.

    path      the folder or the GGUF file; its tokenizer, where it has one, is found there.
    family    how its weights are named.     config  config.json, or a GGUF file's metadata.
    source    the name or path it was opened by.
    adapter   what is put on its weights, where an adapter was opened; `path` is then the adapter's folder if a tokenizer lies there, and
              `spec` has the adapter's score head, which `base_spec` has not.
    """

    path: Path
    family: Family
    spec: ModelSpec
    config: dict[str, Any]
    files: TensorSource
    source: str = ""
    adapter: StoredAdapter | None = None
    base_spec: ModelSpec | None = None

    @property
    def base(self) -> "Checkpoint":
        """The same without its adapter."""
        return self if self.base_spec is None else replace(self, adapter=None, spec=self.base_spec, base_spec=None)

    @property
    def is_gguf(self) -> bool:
        return isinstance(self.files, GGUFTensors)

    @property
    def quant(self) -> Quant | None:
        """How the weights are quantised in a form that is multiplied as it is stored; None for all others."""
        return stored_quant(self.files.file, self.spec) if isinstance(self.files, GGUFTensors) else self.spec.quant

    def rules(self, model: Model) -> list[Rule]:
        """The rows that lead from this file to `model`."""
        if self.is_gguf:
            return llama_gguf.rules(self.spec)
        return rules_of(self.family, self.spec) or identity_rules(model)


@dataclass(frozen=True)
class Loaded:
    """A model in memory, in eval mode, and where it came from."""

    model: Model
    checkpoint: Checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def path(self) -> Path:
        return self.checkpoint.path


class GGUFTensors:
    """The tensors of a GGUF file behind the interface of `TensorFiles`."""

    def __init__(self, file: GGUF) -> None:
        self.file = file

    @property
    def names(self) -> Iterable[str]:
        return self.file.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.info(name).shape)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.file.read(name, dtype)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        self.file.read_into(name, out)


class _Rest(GGUFTensors):
    """A file without the tensors that have been read already."""

    def __init__(self, file: GGUF, used: set[str]) -> None:
        super().__init__(file)
        self.used = used

    @property
    def names(self) -> Iterable[str]:
        return [name for name in self.file.tensors if name not in self.used]


def load_model(source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Loaded:
    """Read a model into memory, in eval mode.

    source  a model folder, a GGUF file, or the name of a pulled model.
    dtype   of all parameters; None takes the one the weights are stored in (float32 for GGUF).

    Memory is taken once, in the final dtype, and every stored tensor is read straight into its place. Raises UserError where
    anything is missing, superfluous, damaged, or describes a model that Weft would compute differently.
    """
    checkpoint = open_checkpoint(source)
    return Loaded(load_weights(checkpoint, device, dtype), checkpoint)


def open_checkpoint(source: str | Path, adapter: str | Path | None = None) -> Checkpoint:
    """Read and check a model's description and the headers of its weights. The folder of an adapter stands for its base with it.

    adapter  the folder of an adapter to put on the model.
    """
    path = find_model(source)
    if is_adapter(path):
        if adapter is not None:
            raise UserError(f"{source} is an adapter and so is {adapter}; give the model that they are for, and one of them.")
        stored = read_adapter(path)
        return open_checkpoint(find_base(stored.base, path), path)
    if adapter is not None:
        stored, base = read_adapter(adapter), open_checkpoint(source)
        spec = base.spec
        if stored.outputs is not None:
            spec = ModelSpec.model_validate({**spec.model_dump(), "score": stored.outputs, "labels": stored.labels})
        return replace(base, adapter=stored, path=stored.path if stored.has_tokenizer else base.path, spec=spec, base_spec=base.spec)
    return replace(_open(path), source=str(source))


def _open(path: Path) -> Checkpoint:
    if path.is_file():
        return _open_gguf(path)
    config = read_config(path)
    family, spec = from_config(config)
    block = scaled_blocks(config)
    files = TensorFiles(path) if block is None else ScaledFiles(path, block)
    return Checkpoint(path, family, held(family, spec, files.names), config, files)


def load_weights(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, packed: bool = False
) -> Model:
    """The model of a checkpoint, its weights read.

    packed  keep a GGUF file's quantised matrices as they are where `checkpoint.quant` says how; `dtype` is then that of the rest.
            Otherwise they are dequantised. A folder that Weft quantised is always kept as it is.
    """
    model = _load_base(checkpoint.base, device, dtype, packed)
    if checkpoint.adapter is not None:
        put_adapter(model, checkpoint.adapter, checkpoint.family, checkpoint.source)
    return model.eval()


def _load_base(checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype | None, packed: bool) -> Model:
    if packed and isinstance(checkpoint.files, GGUFTensors) and checkpoint.quant is not None:
        return _load_packed(checkpoint, checkpoint.files, checkpoint.quant, device, dtype or torch.float32)
    model = materialise(build(checkpoint.spec, "meta", dtype or stored_dtype(checkpoint)), device)
    prefix = "" if checkpoint.is_gguf else checkpoint.family.prefix
    load_tensors(stored_state(model), checkpoint.rules(model), checkpoint.files, prefix, str(checkpoint.path))
    compact(model)
    return model


def _load_packed(checkpoint: Checkpoint, files: "GGUFTensors", quant: Quant, device: str | torch.device, dtype: torch.dtype) -> Model:
    spec = ModelSpec.model_validate({**checkpoint.spec.model_dump(), "quant": quant})
    model = materialise(build(spec, "meta", dtype), device)
    used, left = fill_packed(model, checkpoint.rules(model), files.file)
    load_tensors(dict(model.named_parameters()), left, _Rest(files.file, used), "", str(checkpoint.path))
    compact(model)
    return model


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of a checkpoint's largest tensors; float32 for GGUF, whose tensors are dequantised."""
    files = checkpoint.files
    if checkpoint.spec.quant is not None:
        return torch.float32
    if not isinstance(files, TensorFiles):
        return torch.float32
    largest = max(files.names, key=lambda name: torch.Size(files.shape(name)).numel())
    dtype = files.dtype(largest)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(f"{checkpoint.path} stores {largest} as {dtype}, which is quantised; give float weights or a GGUF file.")
    return dtype


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json; raises UserError where it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a model as transformers or weft saves it.")
    try:
        config = json.loads(read_text(path, "config"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {error}. Fetch or save the model again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; give the folder of a model as transformers or weft saves it.")
    return config


def _open_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    factors = file.read(llama_gguf.ROPE_FACTORS).tolist() if llama_gguf.ROPE_FACTORS in shapes else None
    try:
        spec = llama_gguf.from_gguf(file.metadata, shapes, factors)
    except pydantic.ValidationError as error:
        raise explained(str(path), error) from None
    return Checkpoint(path, FAMILIES["llama"], spec, file.metadata, GGUFTensors(file))
