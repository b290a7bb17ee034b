"""Virtual tokens before texts: packed equals one by one, and nothing of them is predicted."""

import pytest
import torch

from weft.data.collate import ClassifiedBatch, TextRows
from weft.data.packing import PackedBatch
from weft.data.virtual import VirtualBatches, with_virtual
from weft.errors import UserError
from weft.nn import Step, build
from weft.nn.adapters import attach
from weft.objectives.next_token import step_of
from weft.spec import model_spec
from weft.spec.adapters import Prefix, Prompt

ATTENTION = {"mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 24}}
RECURRENT = {"mixer": {"type": "mamba", "state_dim": 4}, "channel": {"type": "gated", "hidden": 24}}


def model_of(settings, layers=(ATTENTION, ATTENTION)):
    spec = model_spec({"vocab": 31, "dim": 16, "context": 64, "init_std": 0.3, "norm": {"type": "rms"}, "layers": list(layers)})
    model = attach(build(spec, dtype=torch.float64, seed=1), settings, seed=2)
    with torch.no_grad():
        model.virtual.vectors += torch.randn(model.virtual.vectors.shape, generator=torch.Generator().manual_seed(3)) * 0.5
    return model


def packed(lengths, width, seed=0):
    """Rows of documents of these lengths one after the other, then padding; and the documents."""
    generator = torch.Generator().manual_seed(seed)
    documents = [[torch.randint(31, (n,), generator=generator) for n in row] for row in lengths]
    rows = len(lengths)
    tokens, positions, segments = (torch.zeros(rows, width, dtype=torch.long) for _ in range(3))
    targets, mask = torch.full((rows, width), -100), torch.zeros(rows, width, dtype=torch.bool)
    for r, row in enumerate(documents):
        at = 0
        for s, document in enumerate(row):
            end = at + len(document)
            tokens[r, at:end], positions[r, at:end], segments[r, at:end] = document, torch.arange(len(document)), s
            targets[r, at : end - 1], mask[r, at : end - 1] = document[1:], True
            at = end
        positions[r, at:], segments[r, at:] = torch.arange(width - at), len(row)
    return PackedBatch(tokens, targets, positions, segments, mask, 0, torch.tensor([sum(row) for row in lengths])), documents


@pytest.mark.parametrize(
    ("settings", "second"),
    [(Prompt(tokens=3), ATTENTION), (Prefix(tokens=3), ATTENTION), (Prompt(tokens=3), RECURRENT)],
    ids=["prompt", "prefix", "prompt of a hybrid"],
)
def test_packed_documents_with_virtual_tokens_equal_each_alone(settings, second):
    model = model_of(settings, (ATTENTION, second))
    batch, documents = packed([[5, 1, 7], [13], [4, 4]], 13)
    given = with_virtual(batch, model.virtual_ids)
    assert given.num_targets == batch.num_targets
    assert given.lengths.tolist() == [13 + 9, 13 + 3, 8 + 6]
    hidden = model(given.tokens, step_of(given)).hidden
    ids = torch.tensor(model.virtual_ids)
    for row, texts in enumerate(documents):
        at = 0
        for text in texts:
            alone = model(torch.cat([ids, text])[None]).hidden[0]
            assert given.tokens[row, at : at + 3].tolist() == ids.tolist()
            assert given.tokens[row, at + 3 : at + 3 + len(text)].tolist() == text.tolist()
            torch.testing.assert_close(hidden[row, at : at + 3 + len(text)], alone, rtol=0, atol=1e-10)
            assert given.positions[row, at : at + 3 + len(text)].tolist() == list(range(3 + len(text)))
            assert given.loss_mask[row, at : at + 3 + len(text)].tolist() == [False] * 3 + [True] * (len(text) - 1) + [False]
            assert given.targets[row, at + 3 : at + 2 + len(text)].tolist() == text[1:].tolist()
            at += 3 + len(text)
    assert not torch.allclose(hidden[0, 3:8], model(documents[0][0][None]).hidden[0], rtol=0, atol=1e-3)  # they do matter


@pytest.mark.parametrize("settings", [Prompt(tokens=4), Prefix(tokens=4)], ids=["prompt", "prefix"])
def test_fresh_virtual_tokens_are_a_text_before_the_text(settings):
    spec = model_spec({"vocab": 31, "dim": 16, "context": 64, "init_std": 0.3, "norm": {"type": "rms"}, "layers": [ATTENTION, ATTENTION]})
    base, text = build(spec, dtype=torch.float64, seed=1), torch.tensor([[4, 9, 2]])
    expected = base(torch.cat([torch.tensor([[7, 8, 7, 8]]), text], 1)).hidden[:, 4:]
    model = attach(build(spec, dtype=torch.float64, seed=1), settings, text=(7, 8))
    given = model(torch.cat([torch.tensor([model.virtual_ids]), text], 1)).hidden[:, 4:]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-10)
    other = attach(build(spec, dtype=torch.float64, seed=1), settings, text=(8, 7))
    assert not torch.allclose(other(torch.cat([torch.tensor([other.virtual_ids]), text], 1)).hidden[:, 4:], expected, rtol=0, atol=1e-6)


def test_rows_and_batches_of_rows():
    rows = TextRows(
        torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]]),
        torch.tensor([[4, 5, 0, 0], [7, 0, 0, 0]]),
        torch.tensor([[False, True, False, False]] * 2),
        torch.tensor([3, 2]),
    )
    given = with_virtual(ClassifiedBatch(rows, torch.tensor([1, 0])), (31, 32)).texts
    assert given.tokens.tolist() == [[31, 32, 3, 4, 5, 0], [31, 32, 6, 7, 0, 0]]
    assert given.targets[:, 2:].tolist() == rows.targets.tolist()
    assert given.mask.tolist() == [[False, False, False, True, False, False]] * 2
    assert given.lengths.tolist() == [5, 4]
    plain = PackedBatch(rows.tokens, rows.targets, torch.arange(4).expand(2, 4), None, rows.mask, 0, rows.lengths)
    given = with_virtual(plain, (31, 32))
    assert given.tokens.tolist() == [[31, 32, 3, 4, 5, 0], [31, 32, 6, 7, 0, 0]]
    assert given.segments is None
    assert given.lengths.tolist() == [5, 4]
    with pytest.raises(UserError, match="which this objective does not train"):
        with_virtual(object(), (31,))


def test_a_model_that_cannot_have_a_prefix_says_so():
    with pytest.raises(UserError, match="layer 1 of the model has no causal attention over keys and values"):
        model_of(Prefix(), (ATTENTION, RECURRENT))


def test_the_source_is_asked_for_everything_else():
    class Source:
        valid, length, tokens_per_batch = True, 13, 39

        def batch(self, step):
            return packed([[5, 1, 7], [13], [4, 4]], 13, seed=step)[0]

        def validation(self, most):
            yield self.batch(most)

        def report(self, steps):
            return [{"steps": steps}]

        def describe(self):
            return {"what": "ever"}

    given = VirtualBatches(Source(), (31, 32, 33))
    assert (given.valid, given.length, given.tokens_per_batch) == (True, 13, 39)
    assert (given.report(4), given.describe()) == ([{"steps": 4}], {"what": "ever"})
    assert torch.equal(given.batch(2).tokens, next(given.validation(2)).tokens)
    assert step_of(given.batch(1)).positions.shape == (3, 22)
    assert isinstance(step_of(given.batch(1)), Step)
