"""Everything a run is, on disk, so that it can go on after a kill at any moment as if nothing had happened.

A checkpoint is a model folder in Hugging Face layout, or an adapter's in PEFT's where one is trained, with three things more:

    optimizer/     moments and momentum in safetensors, named `<role>.<weight>.<slot>`
    <role>/        the weights of a further trained model, such as a critic
    trainer.json   the step, the length of the run, random number states, and the SHA-256 of every file

Nothing in it is pickled. The data cursor is the step: batches are a function of it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from weft.errors import UserError
from weft.files import atomic_folder, atomic_write, sha256
from weft.nn import Model
from weft.train.objective import POLICY
from weft.train.optim import Optimizer
from weft.weights.adapter_files import fill_adapter, read_adapter
from weft.weights.files import TensorFiles, write_safetensors
from weft.weights.load import open_checkpoint
from weft.weights.map import load_tensors, stored_state
from weft.weights.save import SavedTokenizer, write_folder
from weft.zoo import Family

STATE, OPTIMIZER = "trainer.json", "optimizer"
VERSION = 1


@dataclass
class TrainState:
    """Where a run stands.

    step            optimiser steps done; also the data cursor.
    total           steps of the whole run; None while a time budget has not been turned into steps.
    probe           steps that were run before it was.    evaluate_every  steps between evaluations, None as long.
    targets         scored tokens so far.              seconds  of training so far, over all sittings.
    best            lowest held-out loss, and the step it was measured at.    stale  evaluations since.
    metrics_length  bytes of metrics.jsonl that belong to this state.
    finished        why the run is over, or None.
    essentials      the settings that decide the result; a run resumes only under the same ones.
    data            what the batches are made of, as the data describes itself.
    objective       what the objective has to remember, where it does.
    origins         fingerprints of the models that the run reads; empty in runs of before there were any.
    """

    step: int = 0
    total: int | None = None
    probe: int = 0
    evaluate_every: int | None = None
    targets: float = 0.0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    metrics_length: int = 0
    finished: str | None = None
    essentials: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    models: Mapping[str, Model],
    optimizers: Mapping[str, Optimizer],
    state: TrainState,
    rng: list[dict[str, Any]],
    tokenizer: SavedTokenizer | None = None,
    family: Family | None = None,
) -> None:
    """Write a checkpoint in one step: a crash leaves the one before, whole.

    models   all trained ones by role.    rng   one state a process (see `capture_rng`).
    """
    tensors = ((f"{role}.{name}", tensor) for role, optimizer in optimizers.items() for name, tensor in optimizer.state().items())
    with atomic_folder(folder) as partial:
        write_folder(models[POLICY], partial, tokenizer, family=family)
        for role, model in models.items():
            if role != POLICY:
                write_folder(model, partial / role)
        write_safetensors(partial / OPTIMIZER, tensors)
        files = {str(path.relative_to(partial)): sha256(path) for path in sorted(partial.rglob("*")) if path.is_file()}
        body = {"version": VERSION, "state": asdict(state), "rng": rng, "files": files}
        atomic_write(partial / STATE, json.dumps({"sha256": _digest(body), **body}, indent=1))


def save_weights(folder: Path, model: Model, tokenizer: SavedTokenizer | None, family: Family | None, facts: Mapping[str, Any]) -> None:
    """Write the weights alone, with a few facts about them in `training.json`."""
    with atomic_folder(folder) as partial:
        write_folder(model, partial, tokenizer, family=family)
        atomic_write(partial / "training.json", json.dumps(dict(facts), indent=1))


class SavedRun:
    """A checkpoint that has been read and found whole.

    Raises UserError naming the file where one is missing, cut short or altered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        body = _read_state(folder / STATE)
        known = {each.name for each in fields(TrainState)}
        if body.get("version") != VERSION or {*body["state"], "origins"} != known:
            raise UserError(f"{folder} was written by another version of Weft; continue with that one, or start anew with --restart.")
        self.state = TrainState(**body["state"])
        self.rng: list[dict[str, Any]] = body["rng"]
        for name, digest in body["files"].items():
            path = folder / name
            if not path.is_file():
                raise _damaged(folder, path, "is missing")
            if sha256(path) != digest:
                raise _damaged(folder, path, "is cut short or altered: its SHA-256 is not the one it was saved with")

    def load(self, models: Mapping[str, Model], optimizers: Mapping[str, Optimizer]) -> None:
        """Fill models and optimisers, which must be built as those that were saved."""
        for role, model in models.items():
            folder = self.folder if role == POLICY else self.folder / role
            if model.adapters is not None:
                fill_adapter(model, read_adapter(folder))
                continue
            checkpoint = open_checkpoint(folder)
            load_tensors(stored_state(model), checkpoint.rules(model), checkpoint.files, "", str(checkpoint.path))
        files = TensorFiles(self.folder / OPTIMIZER)
        for role, optimizer in optimizers.items():
            prefix = f"{role}."
            try:
                optimizer.load({name.removeprefix(prefix): files.read(name) for name in files.names if name.startswith(prefix)})
            except KeyError as error:
                raise _damaged(self.folder, self.folder / OPTIMIZER, f"has no {error.args[0]}") from None


def _read_state(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        digest = data.pop("sha256")
    except FileNotFoundError:
        raise _damaged(path.parent, path, "is missing") from None
    except (ValueError, KeyError, AttributeError):
        raise _damaged(path.parent, path, "is cut short or altered") from None
    if digest != _digest(data):
        raise _damaged(path.parent, path, "is altered: its SHA-256 is not the one it was saved with")
    body: dict[str, Any] = data
    return body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, path: Path, what: str) -> UserError:
    return UserError(
        f"the checkpoint {folder} cannot be resumed: {path} {what}. Put the file back from a copy, or start anew with --restart."
    )
