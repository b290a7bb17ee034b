"""Classification, reward models, DPO and distillation: worked by hand, cut into micro-batches, padded, and trained."""

import copy
import math
from collections.abc import Callable
from typing import Any

import preference_cases as cases
import pytest
import torch
import torch.nn.functional as F
import train_cases

from weft.nn import Model
from weft.objectives.classify import Classify
from weft.objectives.distill import TEACHER, Distill
from weft.objectives.dpo import DPO, dpo_losses, ipo_losses
from weft.objectives.reference import REFERENCE
from weft.objectives.reward import Reward, bradley_terry
from weft.objectives.settings import ClassifySettings, DistillSettings, DPOSettings, RewardSettings
from weft.train.objective import POLICY, Batch, Objective
from weft.train.parallel import World
from weft.train.window import loss_function, open_window, run_window

CPU = torch.device("cpu")
Case = tuple[Objective[Any], dict[str, Model], Callable[[int | None], Batch]]


def moved(model: Model, seed: int = 9) -> Model:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return other.requires_grad_(False)


def classify() -> Case:
    return Classify(ClassifySettings(lm=0.5)), {POLICY: cases.scoring(3)}, cases.classified


def reward() -> Case:
    return Reward(RewardSettings(centre=0.1)), {POLICY: cases.scoring(1)}, cases.compared


def dpo(**settings: Any) -> Case:
    model = train_cases.model_of()
    return DPO(DPOSettings(**{"nll": 0.2, **settings})), {POLICY: model, REFERENCE: moved(model)}, cases.compared


def distill() -> Case:
    models = {POLICY: train_cases.model_of(), TEACHER: train_cases.model_of(seed=7, vocab=67, dim=24).requires_grad_(False)}
    settings = DistillSettings(teacher="another", temperature=2.0, alpha=0.7)
    return Distill(settings), models, lambda width: train_cases.batches_of(7, width or 24, "pad", masked=True).batch(0)


CASES = {"classify": classify, "reward": reward, "dpo": dpo, "ipo": lambda: dpo(loss="ipo", beta=0.3), "distill": distill}


def stepped(case: Case, micro: int | None, width: int | None = None) -> dict[str, torch.Tensor]:
    """Gradients of one step, and its losses and metrics."""
    objective, models, batch_of = case
    models[POLICY].requires_grad_(True).zero_grad()
    batch = batch_of(width)
    window, _ = open_window(objective, batch, micro, CPU, World())
    sums = run_window(window, loss_function(objective, models, torch.float64), list(models[POLICY].parameters()), World())
    assert {name: float(sums.counts[name]) for name in window.counts} == window.counts
    found = {name: (sums.sums[name] / sums.counts[name]).detach() for name in sums.sums}
    return {**found, **dict(train_cases.gradients(models[POLICY]))}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(name):
    case = CASES[name]()
    whole = stepped(case, None)
    assert sum(float(value.abs().sum()) for value in whole.values()) > 1
    for micro in (1, 2, 4):
        parts = stepped(case, micro)
        for key, expected in whole.items():
            torch.testing.assert_close(parts[key], expected, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["classify", "reward", "dpo", "ipo"])
def test_padding_changes_nothing(name):
    case = CASES[name]()
    narrow, wide = stepped(case, None), stepped(case, None, width=32)
    for key, expected in narrow.items():
        torch.testing.assert_close(wide[key], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_a_token_of_the_texts_changes_the_loss(name):
    """Negative control of the two tests above: gradients do depend on what is in the batch."""
    objective, models, batch_of = CASES[name]()
    whole = stepped((objective, models, batch_of), None)
    other = batch_of(None)
    (other.tokens if name == "distill" else other.texts.tokens)[0, 0] += 1
    changed = stepped((objective, models, lambda width: other), None)
    term = next(iter(whole))
    assert (whole[term] - changed[term]).abs() > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_only_the_policy_learns_and_it_does(name):
    objective, models, batch_of = CASES[name]()
    assert [role for role, facts in objective.roles.items() if facts.trained] == [POLICY]
    optimizer = torch.optim.Adam(models[POLICY].parameters(), 3e-3)
    losses = []
    for _ in range(12):
        batch = batch_of(None)
        compute = loss_function(objective, models, torch.float64)
        scales = {key: torch.tensor(1 / count) for key, count in objective.counts(batch).items()}
        computed = compute(batch, scales)
        computed.loss.backward()
        losses.append(float(computed.loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02
    assert all(parameter.grad is None for role, model in models.items() if role != POLICY for parameter in model.parameters())


def test_bradley_terry_worked_by_hand():
    found = bradley_terry(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([math.log(1 + math.exp(-2)), math.log(1 + math.e)]))


def test_dpo_and_ipo_worked_by_hand():
    chosen, rejected = torch.tensor([3.0]), torch.tensor([1.0])  # log-ratios: the gap is 2
    torch.testing.assert_close(dpo_losses(chosen, rejected, 0.5), torch.tensor([math.log(1 + math.exp(-1))]))
    smooth = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.e)
    torch.testing.assert_close(dpo_losses(chosen, rejected, 0.5, 0.1), torch.tensor([smooth]))
    torch.testing.assert_close(ipo_losses(chosen, rejected, 0.5), torch.tensor([1.0]))
    torch.testing.assert_close(ipo_losses(chosen, rejected, 0.25), torch.tensor([0.0]))


def test_a_reward_is_the_mean_over_examples_of_the_mean_over_their_pairs():
    objective, models, batch_of = reward()
    batch = batch_of(None)
    terms, metrics = objective.loss(models, batch)
    model, expected, right = models[POLICY], 0.0, 0
    with torch.no_grad():
        for example in (*cases.PAIRS, cases.RANKED):
            scores = [float(model.score(model(torch.tensor([answer.ids])).hidden[0, -1])) for answer in example.answers]
            gaps = [scores[a] - scores[b] - margin for (a, b), margin in zip(example.pairs, example.margins, strict=True)]
            expected += sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps)
            right += sum(scores[a] > scores[b] for a, b in example.pairs)
    assert abs(float(terms["ranking"].sum.detach()) - expected) < 1e-10
    assert float(terms["ranking"].count) == 6
    assert (float(metrics["accuracy"].sum), metrics["accuracy"].count) == (right, 8)
    unweighted = float(bradley_terry(*(torch.tensor([1.0]),) * 3))
    assert abs(expected - unweighted) > 1e-3


def test_classification_is_the_paper_s_loss():
    """L3 = L2 + lm L1, each worked out from all logits of each text alone."""
    objective, models, batch_of = classify()
    terms, metrics = objective.loss(models, batch_of(None))
    model, l2, l1, count = models[POLICY], 0.0, 0.0, 0
    with torch.no_grad():
        for example in cases.LABELLED:
            output = model(torch.tensor([example.text.ids]))
            l2 -= float(model.score(output.hidden[0, -1]).log_softmax(-1)[example.label])
            l1 += float(F.cross_entropy(output.logits[0, :-1], torch.tensor(example.text.ids[1:]), reduction="sum"))
            count += len(example.text.ids) - 1
    assert abs(float(terms["class"].sum.detach()) - l2) < 1e-10
    assert abs(float(terms["lm"].sum.detach()) - l1) < 1e-9
    assert (terms["class"].count, int(terms["lm"].count), terms["lm"].weight) == (5, count, 0.5)
    assert 0 <= float(metrics["accuracy"].sum) <= 5
    only, _ = Classify(ClassifySettings(lm=0.0)).loss(models, batch_of(None))
    assert list(only) == ["class"]


def test_dpo_begins_at_log_two_where_the_reference_is_the_policy():
    model = train_cases.model_of()
    terms, metrics = DPO().loss({POLICY: model, REFERENCE: copy.deepcopy(model)}, cases.compared())
    assert abs(float(terms["dpo"].sum.detach()) / 8 - math.log(2)) < 1e-12
    assert float(metrics["margin"].sum.detach()) == 0.0
    other, _ = DPO().loss({POLICY: model, REFERENCE: moved(model)}, cases.compared())
    assert abs(float(other["dpo"].sum.detach()) / 8 - math.log(2)) > 1e-4


def test_an_answer_is_as_likely_whether_its_prompt_goes_through_the_head_or_not(monkeypatch):
    """What a compiled step does, against what is done otherwise."""
    case = dpo()
    scored = stepped(case, 2)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    for key, expected in stepped(case, 2).items():
        torch.testing.assert_close(scored[key], expected, rtol=1e-10, atol=1e-10)


def test_distillation_from_itself_has_the_data_s_loss_alone():
    model = train_cases.model_of()
    objective = Distill(DistillSettings(teacher="itself", alpha=0.5))
    batch = train_cases.batch_of()
    terms, _ = objective.loss({POLICY: model, TEACHER: copy.deepcopy(model)}, batch)
    assert abs(float(terms["distill"].sum.detach())) < 1e-10
    assert float(terms["next_token"].sum.detach()) > 1
    alone = Distill(DistillSettings(teacher="itself", alpha=1.0))
    assert list(alone.counts(batch)) == ["distill"]
    assert list(alone.loss({POLICY: model, TEACHER: model}, batch)[0]) == ["distill"]


def test_a_temperature_keeps_the_size_of_the_gradient():
    """T^2 D is what Hinton et al. (2015), section 2, take it for: as logits go to zero, its gradient is (q - p) / V whatever T."""
    model, teacher = train_cases.model_of(), train_cases.model_of(seed=7)
    with torch.no_grad():
        for each in (model, teacher):
            each.norm.weight.mul_(1e-3)
    sizes = []
    for temperature in (1.0, 4.0):
        objective = Distill(DistillSettings(teacher="another", alpha=1.0, temperature=temperature))
        found = stepped((objective, {POLICY: model, TEACHER: teacher}, lambda width: train_cases.batch_of()), None)
        sizes.append(found["embed.weight"].norm())
    assert abs(sizes[0] / sizes[1] - 1) < 1e-3
