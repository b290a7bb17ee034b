"""Which models a run reads, and whether they are still what they were: a path stays the same when what lies there does not."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from weft.files import sha256
from weft.objectives.settings import PPOSettings
from weft.train.plan import Plan
from weft.weights.adapter_base import find_base
from weft.weights.adapter_config import CONFIG
from weft.weights.adapter_files import is_adapter, read_adapter
from weft.weights.hub import find_model
from weft.weights.layout import find_weights

PIECES, PIECE = 256, 1 << 20  # of a file that is larger than all of them


def origins(plan: Plan) -> dict[str, str]:
    """`key=model` as a recipe has it -> fingerprint, for the model that a run begins as and those that its objective reads."""
    objective = plan.recipe.objective
    read = {f"objective.{key}": getattr(objective, key, None) for key in ("reference", "reward", "teacher")}
    if isinstance(objective, PPOSettings) and objective.critic.model not in ("reward", "policy"):
        read["objective.critic.model"] = objective.critic.model
    found = {f"{key}={source}": fingerprint(source) for key, source in read.items() if source is not None}
    model = plan.recipe.model
    if isinstance(model, str):
        described = plan.spec.model_dump_json(exclude_defaults=True)  # of a file with a spec alone
        found[f"model={model}"] = fingerprint(model) if plan.checkpoint is not None else hashlib.sha256(described.encode()).hexdigest()
    return found


def fingerprint(source: str) -> str:
    """SHA-256 over a model's config and weights, and over its base's where it is an adapter."""
    digest = hashlib.sha256()
    for path in _files(source):
        digest.update(f"{path.name} {file_fingerprint(path)}\n".encode())
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file; of one above 256 MB, of its size and of so much of it in pieces that are spread over it: training moves every
    weight, and a run must not wait for a hundred gigabytes to be read twice."""
    size = path.stat().st_size
    if size <= PIECES * PIECE:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(PIECES):
            file.seek((size - PIECE) * piece // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def _files(source: str | Path) -> Iterator[Path]:
    path = find_model(source)
    if is_adapter(path):
        stored = read_adapter(path)
        yield from (path / CONFIG, stored.files.path)
        yield from _files(find_base(stored.base, path))
    elif path.is_file():
        yield path
    else:
        yield path / "config.json"
        yield from sorted(find_weights(path))
