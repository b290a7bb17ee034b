"""Held-out loss: the same sums and counts as in training, without gradients."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from weft.train.objective import Batch, Measured, Models, Objective
from weft.train.parallel import World
from weft.train.window import Computed, LossFunction, Sums


@torch.no_grad()
def evaluate(
    objective: Objective[Any],
    models: Models,
    batches: Iterable[Batch],
    compute: LossFunction,
    micro_rows: int | None,
    device: torch.device,
    world: World,
    engine: Any = None,
) -> dict[str, float]:
    """Mean of every term and metric over all batches of all processes, and their weighted sum as `loss`. An objective that measures in its
    own way is given the `engine`.

    Modules are put in eval mode and back. A metric that runs over nothing is left out.
    """
    sums, modes = Sums(), {role: model.training for role, model in models.items()}
    ones = None
    for model in models.values():
        model.eval()
    for batch in batches:
        if isinstance(objective, Measured):
            sums.add(Computed(torch.zeros(()), *objective.measure(engine, batch)))
            continue
        if ones is None:
            ones = {name: torch.ones((), device=device) for name in objective.counts(batch)}
        size = micro_rows or batch.num_rows
        for start in range(0, batch.num_rows, size):
            sums.add(compute(batch.rows(start, min(start + size, batch.num_rows)).to(device), ones))
    for role, model in models.items():
        model.train(modes[role])
    assert sums.sums, "validation data gave no batch"
    values = world.sum(sums.row()).tolist()
    totals = dict(zip(sums.sums, zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True), strict=True))
    means = {name: total / count for name, (total, count) in totals.items() if count}
    loss = sum(sums.weights[name] * means.get(name, math.nan) for name in sums.weights)
    terms = means if len(sums.weights) > 1 else {name: value for name, value in means.items() if name not in sums.weights}
    return {"loss": loss, **terms}
