"""Which files hold the weights of a model folder in Hugging Face layout. Importable without torch."""

import json
from pathlib import Path, PurePosixPath

from weft.errors import UserError
from weft.files import read_text

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_SINGLE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth")


def find_weights(path: Path) -> dict[Path, set[str] | None]:
    """Files to read, each with the names an index promises in it (None where there is no index)."""
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in PICKLED_SUFFIXES:
            raise UserError(f"{path} is not a file of weights; give a .safetensors file or a model folder.")
        return {path: None}
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; give a model folder with {SINGLE}.")
    for single, index in ((SINGLE, INDEX), (PICKLED_SINGLE, PICKLED_INDEX)):
        if (path / single).is_file():
            return {path / single: None}
        if (path / index).is_file():
            return dict(_read_index(path / index))
    raise UserError(f"{path} holds no weights: there is no {SINGLE}, {INDEX} or {PICKLED_SINGLE}. Give a model folder.")


def _read_index(index: Path) -> dict[Path, set[str]]:
    """Shard -> names, out of an index; every shard has to be a plain file name of the same folder that exists."""
    text = read_text(index, "index")
    try:
        entries = json.loads(text)["weight_map"].items()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged: it has no 'weight_map' from tensors to files. Fetch the model again.") from None
    suffixes = (".safetensors",) if index.name == INDEX else PICKLED_SUFFIXES
    shards: dict[Path, set[str]] = {}
    for name, shard in entries:
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith(suffixes):
            raise UserError(f"{index} sends the tensor '{name}' to {shard!r}; only {suffixes[0]} files beside the index are allowed.")
        shards.setdefault(index.parent / shard, set()).add(name)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{index.parent} lacks {missing[0]}, one of {len(shards)} files its index names. Fetch the model again.")
    return shards
