"""Embeddings of texts: the mean of the final hidden states over a text's tokens, scaled to length 1."""

import base64
from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F

from weft.nn import Arena, Model

CHUNK = 256


def embed(model: Model, ids: Sequence[int], adapter: int = 0) -> Generator[None, None, list[float]]:
    """The vector of one text, float32; yields between chunks, so that other work goes on beside a long one.

    adapter  the number of the text's adapter, as `Step.adapters` has it. Virtual tokens are read and not averaged.
    """
    device, before = model.device, len(model.virtual_ids)
    ids = (*model.virtual_ids, *ids)
    with torch.inference_mode():
        arena = Arena(model, 1, len(ids), min(CHUNK, len(ids)))
        total = torch.zeros(model.spec.dim, dtype=torch.float64)  # on the CPU: not every device has float64
    for start in range(0, len(ids), CHUNK):
        with torch.inference_mode():
            part = torch.tensor([ids[start : start + CHUNK]], device=device)
            counts = torch.tensor([part.shape[1]], device=device)
            step = arena.step(counts, part.shape[1])
            step.adapters = torch.tensor([adapter], device=device)
            output = model(part, step, arena.views())
            arena.commit(output.pending, counts)
            total += output.hidden[0, max(0, before - start) :].cpu().double().sum(0)
        yield
    vector: list[float] = F.normalize(total, dim=0).float().tolist()
    return vector


def encoded(vector: Sequence[float]) -> str:
    """Little-endian float32 in base64, as OpenAI's clients ask for it."""
    import numpy

    return base64.b64encode(numpy.asarray(vector, dtype="<f4").tobytes()).decode()
