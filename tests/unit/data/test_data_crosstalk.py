"""A real model on packed rows computes what it computes on each document alone: loss and gradient."""

import numpy as np
import torch
import yaml
from data_helpers import store_of

from weft.data.batches import Batches
from weft.data.packing import PackedBatch
from weft.data.store import TokenStore
from weft.data.windows import cut
from weft.nn import Model, Step, build
from weft.spec import model_spec

SPEC = """
vocab: 160
dim: 16
init_std: 0.3
layers:
  - mixer: {type: attention, heads: 4, kv_heads: 2, rope: {base: 10000}}
    channel: {type: gated, hidden: 24}
  - mixer: {type: attention, heads: 2, window: 4, rope: {base: 10000}}
    channel: {type: rwkv_channel_mix, hidden: 24}
  - mixer: {type: mamba, state_dim: 4}
  - mixer: {type: lstm}
"""
LENGTHS = [7, 1, 12, 3, 19, 2, 5, 16, 9, 4, 11]


def nats(model: Model, tokens: torch.Tensor, targets: torch.Tensor, step: Step) -> torch.Tensor:
    logits = model(tokens, step).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def packed_nats(model: Model, batch: PackedBatch, apart: bool = True) -> torch.Tensor:
    if batch.segments is None or not apart:
        return nats(model, batch.tokens, batch.targets, Step.parallel(batch.tokens, batch.lengths if apart else None))
    return nats(model, batch.tokens, batch.targets, Step.packed(batch.positions, batch.segments))


def alone_nats(model: Model, store: TokenStore) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for index in range(store.num_documents):
        ids = torch.from_numpy(store.tokens_at(np.arange(*store.document(index))))[None]
        if ids.shape[1] > 1:
            total = total + nats(model, ids[:, :-1], ids[:, 1:], Step.parallel(ids[:, :-1]))
    return total


def gradient(model: Model, loss: torch.Tensor) -> torch.Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def test_packed_equals_separate() -> None:
    store = store_of(LENGTHS)
    model = build(model_spec(yaml.safe_load(SPEC)), dtype=torch.float64, seed=3)
    expected = alone_nats(model, store)
    slope = gradient(model, expected)
    for mode in ("best_fit", "pad"):
        held = cut(store, 23, mode)
        batches = list(Batches(held, 2, valid=held).validation())
        found = torch.stack([packed_nats(model, batch) for batch in batches]).sum()
        assert abs(found - expected) < 1e-10 * expected
        assert (gradient(model, found) - slope).abs().max() < 1e-10 * slope.abs().max()
    held = cut(store, 23, "best_fit")
    mixed = torch.stack([packed_nats(model, batch, apart=False) for batch in Batches(held, 2, valid=held).validation()]).sum()
    assert abs(mixed - expected) > 1e-3 * expected  # the same rows read as one sequence each
    assert (gradient(model, mixed) - slope).abs().max() > 1e-3 * slope.abs().max()


def test_packed_pieces_equal_fresh_starts() -> None:
    """`pack` cuts documents at row ends; each piece is then a document of its own, read from position 0."""
    store = store_of(LENGTHS)
    model = build(model_spec(yaml.safe_load(SPEC)), dtype=torch.float64, seed=3)
    batches = Batches(cut(store, 10), 3, seed=1)
    for step in range(4):
        batch = batches.batch(step)
        expected = torch.zeros((), dtype=torch.float64)
        assert batch.segments is not None
        assert batch.lengths is not None
        for row, size in enumerate(batch.lengths.tolist()):
            for number in range(int(batch.segments[row, :size].max()) + 1):
                chosen = (batch.segments[row, :size] == number).nonzero().flatten()
                tokens, targets = batch.tokens[row, chosen][None], batch.targets[row, chosen][None]
                expected = expected + nats(model, tokens, targets, Step.parallel(tokens))
        assert abs(packed_nats(model, batch) - expected) < 1e-10 * expected
        assert abs(packed_nats(model, batch, apart=False) - expected) > 1e-3 * expected
