"""What happened at each step: kept on the device until someone looks, then a line of metrics.jsonl each."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import UserError
from weft.train.parallel import World
from weft.train.window import Sums

Row = dict[str, Any]


class History:
    """Steps whose numbers have not been fetched: fetching waits for the device, so it is done for many steps at once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._notes: list[tuple[Row, Mapping[str, float], Mapping[str, float]]] = []
        self._names: list[str] = []
        self._said: list[str] = []
        self._values: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._notes)

    def note(self, row: Row, counts: Mapping[str, float], sums: Sums, said: Mapping[str, Tensor]) -> None:
        """Remember one step: `row` is completed with its losses and metrics when it is fetched, and with `said`, scalars that every process
        knows already for all of them; the gradient's norm is one."""
        self._names, self._said = list(sums.sums), list(said)
        values = sums.row()
        known = torch.stack([value.to(values.dtype) for value in said.values()])
        self._values.append(torch.cat([values, known if self.world.leads else torch.zeros_like(known)]))
        self._notes.append((row, counts, sums.weights))

    def fetch(self) -> list[Row]:
        """The rows of all steps noted since the last call, over all processes. A loss that is not finite stays so."""
        if not self._notes:
            return []
        table = self.world.sum(torch.stack(self._values)).tolist()
        rows = [self._complete(*note, values) for note, values in zip(self._notes, table, strict=True)]
        self._notes, self._values = [], []
        return rows

    def _complete(self, row: Row, counts: Mapping[str, float], weights: Mapping[str, float], values: list[float]) -> Row:
        size = len(self._names)
        loss, parts = 0.0, {}
        for name, total, count in zip(self._names, values[:size], values[size : 2 * size], strict=True):
            if name in counts:
                assert count == counts[name], f"the objective counts {counts[name]} for '{name}' but its loss runs over {count}"
                loss += weights[name] * total / max(count, 1.0)
            parts[name] = total / count if count else None
        terms = {name: parts.pop(name) for name in counts}
        return {
            "step": row["step"],
            "loss": loss,
            **(terms if len(terms) > 1 else {}),
            **parts,
            **dict(zip(self._said, values[2 * size :], strict=True)),
            **row,
        }


def check_finite(rows: list[Row], kept: str) -> None:
    """Raise UserError at the first step whose loss or gradient is not a number; `kept` says which good weights there are."""
    for row in rows:
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            what = "loss" if not math.isfinite(row["loss"]) else "gradient"
            raise UserError(
                f"the {what} of step {row['step']} is {row['loss' if what == 'loss' else 'grad_norm']}, so training stopped. {kept} "
                "Lower optim.lr, lengthen optim.warmup or set optim.clip, and start again with --restart or another out."
            )


class MetricsFile:
    """metrics.jsonl: a line a step and a line an evaluation. Its length is part of a checkpoint, so that a resumed run cuts off what
    was written after it."""

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        with open(path, "ab") as file:
            if file.seek(0, os.SEEK_END) > length:
                file.truncate(length)
        self.length = min(length, path.stat().st_size)

    def append(self, rows: list[Row]) -> None:
        if not rows:
            return
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with open(self.path, "ab") as file:
            file.write(data)
        self.length += len(data)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
