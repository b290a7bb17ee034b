"""Asks llama.cpp, where its Python binding is installed, whether it reads a GGUF file as Weft does."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import UserError


def logits_by_llama_cpp(path: Path, ids: Tensor) -> Tensor | None:
    """Logits [T, vocab], float32, that llama.cpp computes for ids [T]; None where it is not installed.

    Raises UserError where llama.cpp cannot load the file.
    """
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError):  # absent, or built for another machine
        return None
    try:
        model = llama_cpp.Llama(str(path), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False)
    except ValueError as error:
        raise UserError(f"the copy was not kept: llama.cpp does not load it ({error}); export with --to hf instead.") from None
    try:
        model.eval(ids.tolist())
        return torch.tensor(model.scores[: len(ids)], dtype=torch.float32)
    finally:
        model.close()
