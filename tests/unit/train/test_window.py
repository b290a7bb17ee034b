"""Accumulation equals one large batch, however unevenly tokens fall on the micro-batches."""

import pytest
import torch
import train_cases as cases

from weft.errors import UserError
from weft.objectives.next_token import NextToken
from weft.objectives.settings import NextTokenSettings
from weft.train.history import History
from weft.train.objective import POLICY, Term
from weft.train.parallel import World
from weft.train.window import loss_function, open_window, run_window

CPU, WORLD = torch.device("cpu"), World()


def _gradients(micro, objective=None, batch=None):
    model, objective = cases.model_of(), objective or NextToken()
    compute = loss_function(objective, {POLICY: model}, torch.float64)
    window, _ = open_window(objective, batch or cases.batch_of(), micro, CPU, WORLD)
    sums = run_window(window, compute, list(model.parameters()), WORLD)
    history = History(WORLD)
    history.note({"step": 1}, window.counts, sums, {"grad_norm": torch.tensor(0.0)})
    return history.fetch()[0]["loss"], dict(cases.gradients(model)), window


class TwoTerms(NextToken):
    """The next-token loss, and a second term that runs over rows: L2 + 0.5 L1 in shape."""

    def counts(self, batch):
        return {**super().counts(batch), "rows": batch.num_rows}

    def loss(self, models, batch):
        terms, metrics = super().loss(models, batch)
        hidden = models[POLICY](batch.tokens).hidden
        return {**terms, "rows": Term(hidden[:, -1].square().sum(), batch.num_rows, 0.5)}, metrics


@pytest.mark.parametrize("objective", [NextToken(NextTokenSettings(label_smoothing=0.1), chunk=13), TwoTerms()])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_accumulation_equals_one_batch_with_a_ragged_last_window(micro, objective):
    whole_loss, whole, _ = _gradients(None, objective)
    loss, parts, window = _gradients(micro, objective)
    assert window.micros[-1].num_rows == 7 % micro or micro == 1
    assert loss == pytest.approx(whole_loss, abs=1e-10)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=0, atol=1e-10)


def test_a_mean_of_means_would_differ():
    """Negative control: dividing each micro-batch by its own count, as a mean loss does, is another gradient."""
    _, whole, window = _gradients(3)
    model = cases.model_of()
    compute = loss_function(NextToken(), {POLICY: model}, torch.float64)
    for micro in window.micros:
        scale = {"next_token": torch.tensor(1 / (micro.num_targets * len(window.micros)), dtype=torch.float64)}
        compute(micro, scale).loss.backward()
    difference = max((gradient - whole[name]).abs().max() for name, gradient in cases.gradients(model))
    assert difference > 1e-4


def test_the_loss_is_the_mean_over_scored_targets():
    batch = cases.batch_of()
    model = cases.model_of()
    logits = model(batch.tokens, None if batch.segments is None else _step(batch)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    loss, _, window = _gradients(2, batch=batch)
    assert loss == pytest.approx(expected.item(), abs=1e-12)
    assert window.counts["next_token"] == batch.num_targets
    assert 0 < batch.num_targets < batch.tokens.numel() * 0.7, "about half of the targets are masked"


def _step(batch):
    from weft.objectives.next_token import step_of

    return step_of(batch)


def test_a_term_may_be_empty_but_not_all_of_them():
    batch = cases.batch_of()
    nothing = batch.rows(0, 7)
    object.__setattr__(nothing, "loss_mask", torch.zeros_like(batch.loss_mask))
    with pytest.raises(UserError, match="every target in it is masked"):
        open_window(NextToken(), nothing, None, CPU, WORLD)
    loss, _, _ = _gradients(2, TwoTerms(), nothing)
    assert loss > 0


def test_counts_that_disagree_with_the_loss_are_noticed():
    class Wrong(NextToken):
        def counts(self, batch):
            return {"next_token": batch.num_targets + 1}

    with pytest.raises(AssertionError, match="counts"):
        _gradients(2, Wrong())


def test_flags_travel_with_the_counts():
    _, raised = open_window(NextToken(), cases.batch_of(), 2, CPU, WORLD, (True, False))
    assert raised == [True, False]


def test_gradient_checkpointing_changes_nothing():
    _, plain, window = _gradients(3)
    model = cases.model_of()
    model.gradient_checkpointing = True
    run_window(window, loss_function(NextToken(), {POLICY: model}, torch.float64), list(model.parameters()), WORLD)
    for name, gradient in cases.gradients(model):
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-13)


def test_the_compiled_loss_is_the_same():
    _, plain, window = _gradients(None)
    model = cases.model_of()
    torch._dynamo.reset()
    compute = loss_function(NextToken(), {POLICY: model}, torch.float64)
    run_window(window, torch.compile(compute, backend="aot_eager", fullgraph=True), list(model.parameters()), WORLD)
    for name, gradient in cases.gradients(model):
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-11)
