"""Runs the checks on a model."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from weft.engine.open import open_weights
from weft.errors import UserError
from weft.spec import ModelSpec
from weft.verify.check import Check, Outcome, Report
from weft.verify.drift import quantised_drift
from weft.verify.files import one_bos, save_then_load
from weft.verify.generation import batch_equals_single, kept_state_equals_fresh, speculation_equals_plain, stream_equals_whole
from weft.verify.oracle import equals_transformers
from weft.verify.passes import chunked_equals_whole, incremental_equals_parallel
from weft.verify.prompts import built_in, read_prompts
from weft.verify.subject import Subject
from weft.weights.fidelity import tokenizer_of
from weft.weights.load import open_checkpoint

CHECKS: tuple[tuple[str, Callable[[Subject], Outcome]], ...] = (
    ("parity with transformers", equals_transformers),
    ("incremental == parallel", incremental_equals_parallel),
    ("chunked == whole", chunked_equals_whole),
    ("batch == single", batch_equals_single),
    ("prefix cache == fresh", kept_state_equals_fresh),
    ("speculation == plain", speculation_equals_plain),
    ("stream == non-stream", stream_equals_whole),
    ("save == load", save_then_load),
    ("quantised drift", quantised_drift),
    ("one BOS", one_bos),
)


def verify(
    source: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    prompts: Path | None = None,
    quick: bool = False,
    show: Callable[[Check], None] = lambda check: None,
) -> Report:
    """Check a model on this machine.

    source         a pulled model's name, a model folder or a GGUF file.
    device, dtype  what to run on and in, as `--device` and `--dtype` take them; auto is what the other verbs run in.
    prompts        a file of prompts to use instead of the built-in ones.
    quick          shorter prompts and texts.
    show           called with each check when it is done.
    Raises UserError where the model or the prompts cannot be used.
    """
    subject = open_subject(source, device, dtype, prompts, quick)
    checks = []
    for name, check in CHECKS:
        if check is quantised_drift and not subject.quantised:
            continue
        start = time.perf_counter()
        outcome = _run(check, subject)
        checks.append(Check(name, outcome, time.perf_counter() - start))
        show(checks[-1])
    return Report(str(source), str(subject.device), str(subject.dtype).removeprefix("torch."), tuple(checks))


def open_subject(source: str | Path, device: str, dtype: str, prompts: Path | None, quick: bool) -> Subject:
    """Read the model and the prompts."""
    checkpoint = open_checkpoint(source)
    if checkpoint.adapter is not None:
        raise UserError(
            f"{source} is an adapter; verify what it makes of its base: weft merge adapter {source} -o OUT, then weft verify OUT"
        )
    spec, tokenizer = checkpoint.spec, tokenizer_of(checkpoint.path)
    _check_shape(str(source), spec)
    new_tokens = min(12 if quick else 32, spec.context // 4)
    if prompts is not None:
        chosen = read_prompts(prompts, tokenizer, spec, new_tokens)
    else:
        chosen = built_in(tokenizer, spec, new_tokens, 96 if quick else 400)
    model = open_weights(checkpoint, device, dtype)
    return Subject(checkpoint, model, tokenizer, tuple(chosen), new_tokens, (7, 32) if quick else (5, 32, 256))


def _check_shape(source: str, spec: ModelSpec) -> None:
    """Raise UserError for a model that cannot be asked to continue a text."""
    state = spec.state()
    if state is None:
        raise UserError(f"{source} attends to the whole sequence (causal: false), so it generates nothing; verify takes causal models.")
    if any(leaf.kind == "static" for layer in state for leaves in layer.values() for leaf in leaves.values()):
        raise UserError(
            f"{source} attends to a memory (cross-attention), of which verify has no example; verify takes models of text alone."
        )
    if spec.context < 8:
        raise UserError(f"the context of {source} is {spec.context} tokens, too few to compare anything; verify takes models from 8 on.")


def _run(check: Callable[[Subject], Outcome], subject: Subject) -> Outcome:
    """A check that cannot be carried out says why: a model that makes Weft stumble has not been verified."""
    try:
        return check(subject)
    except torch.OutOfMemoryError as error:
        return Outcome.skipped(f"there is not enough memory: {str(error).splitlines()[0]}")
    except Exception as error:
        return Outcome("fail", detail=f"it stopped with {type(error).__name__}: {error}")
