"""The loss of multi-token prediction: against loops over documents, in micro-batches, and through a recipe's plan."""

import pytest
import torch
import torch.nn.functional as F
import train_cases as cases

from weft.errors import UserError
from weft.nn import Step
from weft.objectives.mtp import shifted
from weft.objectives.next_token import NextToken, step_of
from weft.objectives.settings import NextTokenSettings
from weft.train.matrices import trained_weights
from weft.train.objective import POLICY
from weft.train.parallel import World
from weft.train.window import loss_function, open_window, run_window

DEPTH = 3


def model_of(kind="sequential"):
    return cases.model_of(mtp={"type": kind, "depth": DEPTH})


def objective_of(weight=0.5, **settings):
    return NextToken(NextTokenSettings(mtp=weight, **settings), depth=DEPTH)


def documents(batch):
    """(row, start, end) of every stretch of a batch that is one document or piece of one."""
    for row, (positions, length) in enumerate(zip(batch.positions.tolist(), batch.lengths.tolist(), strict=True)):
        starts = [i for i in range(length) if positions[i] == 0]
        yield from ((row, start, end) for start, end in zip(starts, [*starts[1:], length], strict=True))


def by_hand(model, batch, k):
    """Sum and count of depth k's loss, document by document and token by token, each document on its own."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, start, end in documents(batch):
        tokens = batch.tokens[row : row + 1, start:end]
        hidden = model(tokens, Step.parallel(tokens), ahead=True).aux[f"mtp.{k}"][0]
        for i in range(end - start - k):
            if batch.loss_mask[row, start + i + k]:
                total = total + F.cross_entropy(model.logits(hidden[i]), batch.targets[row, start + i + k])
                count += 1
    return total, count


@pytest.mark.parametrize("kind", ["sequential", "independent"])
@pytest.mark.parametrize("masked", [True, False])
def test_sums_and_counts_are_those_of_documents_alone(kind, masked):
    model, batch = model_of(kind), cases.batch_of(3, masked)
    terms, _ = objective_of().loss({POLICY: model}, batch)
    assert list(terms) == ["next_token", "mtp_1", "mtp_2", "mtp_3"]
    for k in range(1, DEPTH + 1):
        total, count = by_hand(model, batch, k)
        assert terms[f"mtp_{k}"].count == count == objective_of().counts(batch)[f"mtp_{k}"]
        assert abs(terms[f"mtp_{k}"].sum - total) < 1e-9
        assert terms[f"mtp_{k}"].weight == 0.5 / DEPTH
    plain, _ = NextToken().loss({POLICY: model}, batch)
    assert torch.equal(plain["next_token"].sum, terms["next_token"].sum)


def test_a_target_of_the_next_document_is_noticed():
    """Control: without the look at segments, places are scored whose token lies in the next document."""
    batch = cases.batch_of(5, masked=False)
    assert batch.segments is not None
    leaking = batch.loss_mask.roll(-1, 1) & (torch.arange(24) < 23)
    assert leaking.sum() > shifted(batch, 1)[1].sum()
    for k in (1, 2, 3):
        _, mask = shifted(batch, k)
        row, place = mask.nonzero().unbind(1)
        assert (batch.segments[row, place] == batch.segments[row, place + k]).all()
        assert (batch.positions[row, place + k] == batch.positions[row, place] + k).all()


@pytest.mark.parametrize("micro", [2, 3])
def test_accumulation_equals_one_batch(micro):
    batch, gradients = cases.batch_of(), []
    for size in (None, micro):
        model, objective = model_of(), objective_of(label_smoothing=0.1)
        window, _ = open_window(objective, batch, size, torch.device("cpu"), World())
        run_window(window, loss_function(objective, {POLICY: model}, torch.float64), list(model.parameters()), World())
        gradients.append(dict(cases.gradients(model)))
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-10)
    assert all(gradients[0][name].abs().max() > 0 for name in gradients[0] if name.startswith("mtp"))


def test_weights_share_one_lambda_and_zero_leaves_the_modules_alone():
    model, batch = model_of(), cases.batch_of(2)
    assert NextToken(depth=2).loss({POLICY: model}, batch)[0]["mtp_2"].weight == 0.15, "0.3 unless told otherwise"
    assert list(objective_of(0.0).counts(batch)) == ["next_token"]
    assert list(objective_of(0.0).loss({POLICY: model}, batch)[0]) == ["next_token"]


def test_learning_to_look_ahead_works(tmp_path):
    """A few steps on a text that repeats: what comes two tokens on is learned, and the next token as before."""
    model = model_of()
    batch = cases.batches_of(4, mode="stream").batch(0)
    tokens = (torch.arange(24)[None] * 7 + torch.arange(4)[:, None]) % 5
    batch = type(batch)(tokens, tokens.roll(-1, 1), batch.positions, None, torch.arange(24).expand(4, -1) < 23, 0)
    optimiser, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(30):
        terms, _ = objective_of().loss({POLICY: model}, batch)
        losses.append({name: (term.sum / term.count).item() for name, term in terms.items()})
        optimiser.zero_grad()
        sum(term.weight * term.sum / term.count for term in terms.values()).backward()
        optimiser.step()
    for name in ("next_token", "mtp_1", "mtp_3"):
        assert losses[-1][name] < losses[0][name] / 4


def test_matrices_of_the_modules_are_trained_as_those_of_layers():
    kinds = {weight.name: (weight.kind, weight.rows) for weight in trained_weights(model_of())}
    assert kinds["mtp.0.eh_proj.weight"] == ("matrix", (16,))
    for part in ("mixer.qkv", "mixer.out", "channel.gate_up", "channel.down", "mixer_norm"):
        assert kinds[f"mtp.1.block.{part}.weight"] == kinds[f"blocks.1.{part}.weight"]
    assert kinds["mtp.0.enorm.weight"][0] == "vector"


def test_compiles_with_the_model_to_one_graph():
    torch._dynamo.reset()
    model, batch = model_of(), cases.batch_of(2)

    def loss(tokens):
        return model(tokens, step_of(batch), ahead=True).aux["mtp.2"]

    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=False)
    assert (compiled(batch.tokens) - loss(batch.tokens)).abs().max() < 1e-12


def test_a_weight_for_modules_that_are_not_there_is_refused(tmp_path):
    from weft.train.plan import make_plan
    from weft.train.recipe import Recipe

    text = tmp_path / "text.txt"
    text.write_text("some words to read, again and again\n" * 40)
    cases.save_tokenizer(tmp_path / "tokenizer")
    recipe = {"model": {**cases.LLAMA, "vocab": 258}, "data": str(text), "tokenizer": str(tmp_path / "tokenizer"), "out": "run", "steps": 2}
    with pytest.raises(UserError, match=r"objective.mtp is 0.3, but the model has no modules for multi-token prediction"):
        make_plan(Recipe.model_validate({**recipe, "objective": {"mtp": 0.3}}))
    recipe["model"]["mtp"] = {"depth": 2}
    assert make_plan(Recipe.model_validate({**recipe, "objective": {"mtp": 0.3}})).spec.mtp.depth == 2
