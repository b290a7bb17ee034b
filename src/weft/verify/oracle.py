"""Parity with transformers, where it is installed: an independent implementation of the same published models."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.nn import Model
from weft.verify.check import Outcome
from weft.verify.passes import Gap, gap_of, outcome_of
from weft.verify.prompts import Prompt
from weft.verify.subject import LOGIT_LIMITS, Subject
from weft.weights.save import write_folder
from weft.zoo import describe
from weft.zoo.native import NATIVE

_UNKNOWN = "transformers has no model of this shape"
_PROMPTS = 4
_TOKENS = 128  # of each prompt: transformers returns the logits of all of them at once


def equals_transformers(subject: Subject) -> Outcome:
    """Logits in float32, whatever the model runs in, of the same weights: a folder as it is, quantised ones dequantised into one."""
    checkpoint = subject.checkpoint
    if checkpoint.family is NATIVE and not subject.quantised:
        return Outcome.skipped(_UNKNOWN)
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return Outcome.skipped("transformers is not installed; pip install transformers")
    model = subject.in_float32()
    if model is None:
        return Outcome.skipped(f"a float32 copy takes {subject.float32_bytes / 1e9:.1f} GB of memory, more than is free")
    family, _ = describe(model.spec, checkpoint.family)
    if family is NATIVE:
        return Outcome.skipped(_UNKNOWN)
    prompts = [Prompt(prompt.text, prompt.ids[:_TOKENS]) for prompt in subject.longest(_PROMPTS)]
    with tempfile.TemporaryDirectory(prefix="weft-verify-") as temporary:
        folder = checkpoint.path
        if checkpoint.is_gguf or subject.quantised or model.spec.score is not None:  # a classifier's own files may hold no other head
            folder = Path(temporary)
            write_folder(model, folder, family=family)
        ours = [_logits(model, prompt) for prompt in prompts]
        del model  # a copy need not be in memory beside theirs
        try:
            theirs = _open(transformers, folder).to(subject.device)
        except (OSError, ValueError, KeyError, ImportError) as error:
            return Outcome.skipped(f"transformers cannot read {folder}: {(str(error) or repr(error)).splitlines()[0]}")
        gaps = [_gap(theirs, prompt, logits) for prompt, logits in zip(prompts, ours, strict=True)]
    compared = [("weft against transformers", prompt, gap) for prompt, gap in zip(prompts, gaps, strict=True)]
    return outcome_of(compared, LOGIT_LIMITS[torch.float32], f"float32, transformers {transformers.__version__}: ")


def _open(transformers: Any, folder: Path) -> Any:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    return model.eval()


@torch.inference_mode()
def _logits(model: Model, prompt: Prompt) -> Tensor:
    """Logits [T, V] of a prompt."""
    logits: Tensor = model(torch.tensor([prompt.ids], device=model.device)).logits[0]
    return logits


@torch.inference_mode()
def _gap(theirs: Any, prompt: Prompt, ours: Tensor) -> Gap:
    logits = theirs(torch.tensor([prompt.ids], device=ours.device)).logits[0]
    return gap_of([(ours, logits.float())])
