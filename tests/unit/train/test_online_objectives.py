"""PPO, GRPO and rejection sampling: their losses against definitions written out token by token, micro-batches, and bad input."""

from dataclasses import replace

import online_cases as online
import pytest
import torch

from weft.errors import UserError
from weft.objectives.advantages import naive_gae
from weft.objectives.grpo import GRPO
from weft.objectives.ppo import PPO
from weft.objectives.reference import REFERENCE
from weft.objectives.rejection import Rejection
from weft.objectives.settings import GRPOSettings, PPOSettings, RejectionSettings
from weft.train.objective import POLICY
from weft.train.parallel import World
from weft.train.rollout import Sampled
from weft.train.window import loss_function, open_window, run_window


@pytest.fixture
def tokenizer(tmp_path):
    return online.tokenizer_of(tmp_path)


def made(tokenizer, folder, kind, **settings):
    """An objective with its models and a rollout; the reference is another model, so that no divergence is 0."""
    if kind == "ppo":
        objective = PPO(PPOSettings(rewards=online.judge_of(folder), critic={"model": "policy"}, samples=2, max_tokens=9, **settings))
        models = {REFERENCE: online.policy_of(2), "critic": online.scorer_of(3)}
    elif kind == "grpo":
        objective = GRPO(GRPOSettings(rewards=online.judge_of(folder), samples=3, max_tokens=9, **settings))
        models = {REFERENCE: online.policy_of(2)}
    else:
        objective = Rejection(RejectionSettings(rewards=online.judge_of(folder), samples=3, max_tokens=9, **settings))
        models = {}
    engine = online.rollouts_of(tokenizer, models, temperature=settings.get("temperature", 1.0))
    return objective, engine, objective.rollout(engine, online.prompts_of(tokenizer))


def rows_of(batch):
    """(row, places of the answer, ids) of every row."""
    for row in range(batch.num_rows):
        places = batch.texts.mask[row].nonzero()[:, 0].tolist()
        yield row, places, batch.texts.tokens[row, : batch.texts.lengths[row]]


def naive_log_probs(model, ids, places, temperature=1.0):
    """log P of the token after each place, from the logits of the text alone."""
    logits = model(ids[None]).logits[0] / temperature
    return torch.stack([logits[place].log_softmax(-1)[ids[place + 1]] for place in places])


def noise_of(batch):
    return torch.randn(batch.texts.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def total(objective, models, batch):
    terms, _ = objective.loss(models, batch)
    return sum(term.weight * term.sum / term.count for term in terms.values())


def gradient(objective, models, batch, micro):
    """Of the loss as the trainer takes it, in micro-batches of so many rows."""
    trained = [p for role, facts in objective.roles.items() if facts.trained for p in models[role].parameters()]
    for parameter in trained:
        parameter.grad = None
    window, _ = open_window(objective, batch, micro, torch.device("cpu"), World())
    run_window(window, loss_function(objective, models, torch.float64), trained, World())
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]


def test_ppos_rollout_and_loss_are_their_definitions(tokenizer, tmp_path):
    objective, engine, batch = made(tokenizer, tmp_path, "ppo", beta=0.3, gamma=0.98, lam=0.9, value_weight=0.7)
    models = engine.models
    returns, advantages, old_values, olds = {}, {}, {}, {}
    with torch.no_grad():
        for row, places, ids in rows_of(batch):
            old, away = (naive_log_probs(models[role], ids, places) for role in (POLICY, REFERENCE))
            values = models["critic"].score(models["critic"](ids[None]).hidden)[0, places, 0]
            rewards = [-0.3 * float(a - b) for a, b in zip(old, away, strict=True)]
            rewards[-1] += float(batch.columns["reward"][row])
            every = torch.ones(1, len(places), dtype=torch.bool)
            found = naive_gae(torch.tensor([rewards], dtype=torch.float64), values[None], every, 0.98, 0.9)[0]
            advantages[row], returns[row], old_values[row], olds[row] = found, found + values, values, old
            torch.testing.assert_close(batch.columns["answer_kl"][row], (old - away).sum(), rtol=0, atol=1e-10)
            torch.testing.assert_close(batch.tables["return"][row, places], returns[row], rtol=0, atol=1e-5)  # rewards are float32
    flat = torch.cat(list(advantages.values()))
    mean, std = flat.mean(), flat.std(correction=0)
    batch = replace(batch, tables={**batch.tables, "old": batch.tables["old"] + 0.15 * noise_of(batch)})
    policy = value = tokens = 0
    for row, places, ids in rows_of(batch):
        now = naive_log_probs(models[POLICY], ids, places)
        foretold = models["critic"].score(models["critic"](ids[None]).hidden)[0, places, 0] + 0.0
        for t, place in enumerate(places):
            ratio, advantage = (now[t] - batch.tables["old"][row, place]).exp(), (advantages[row][t] - mean) / std
            policy = policy - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            value, tokens = value + 0.5 * (foretold[t] - returns[row][t]).square(), tokens + 1
    expected = policy / tokens + 0.7 * value / tokens
    torch.testing.assert_close(total(objective, models, batch), expected, rtol=0, atol=1e-5)
    terms, metrics = objective.loss(models, batch)
    assert terms["policy"].count == tokens
    assert 0 < metrics["clipped"].sum < tokens
    # Negative controls: a looser clip, and returns that were whitened too.
    loose = PPO(PPOSettings(**objective.settings.model_dump() | {"clip": 0.5}))
    assert (total(loose, models, batch) - expected).abs() > 1e-3
    wrong = replace(batch, tables={**batch.tables, "return": batch.tables["advantage"]})
    assert (total(objective, models, wrong) - expected).abs() > 1e-3


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_grpos_loss_is_its_definition(tokenizer, tmp_path, loss):
    objective, engine, batch = made(tokenizer, tmp_path, "grpo", loss=loss, beta=0.2, temperature=0.8, epochs=2, clip_high=0.3)
    models, rewards = engine.models, batch.columns["reward"].double().view(-1, 3)
    expected_advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    batch = replace(batch, tables={**batch.tables, "old": batch.tables["old"] + 0.3 * noise_of(batch)})
    each, tokens = [], 0
    for row, places, ids in rows_of(batch):
        now, away = naive_log_probs(models[POLICY], ids, places, 0.8), naive_log_probs(models[REFERENCE], ids, places, 0.8)
        ratio = (now - batch.tables["old"][row, places]).exp()
        advantage = expected_advantages[row]
        losses = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        losses = losses + 0.2 * ((away - now).exp() - (away - now) - 1)
        each.append(losses.mean() if loss == "grpo" else losses.sum())
        tokens += len(places)
    divisor = {"grpo": batch.num_rows, "dapo": tokens, "dr_grpo": batch.num_rows * 9}[loss]
    expected = torch.stack(each).sum() / divisor
    torch.testing.assert_close(total(objective, models, batch), expected, rtol=0, atol=1e-5)
    other = {"grpo": "dapo", "dapo": "dr_grpo", "dr_grpo": "grpo"}[loss]
    wrong = GRPO(GRPOSettings(**objective.settings.model_dump() | {"loss": other}))
    assert (total(wrong, models, batch) - expected).abs() > 1e-3


def test_one_update_needs_no_old_log_probabilities(tokenizer, tmp_path):
    objective, engine, batch = made(tokenizer, tmp_path, "grpo")
    assert set(batch.tables) == {"reference"}
    again, _, several = made(tokenizer, tmp_path, "grpo", epochs=2)
    assert set(several.tables) == {"old", "reference"}
    for one, other in zip(gradient(objective, engine.models, batch, None), gradient(again, engine.models, several, None), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    _, _, free = made(tokenizer, tmp_path, "grpo", beta=0.0)
    assert not free.tables


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rejection"])
@pytest.mark.parametrize("unfinished", ["keep", "mask"])
def test_micro_batches_add_up_to_the_whole(tokenizer, tmp_path, kind, unfinished):
    objective, engine, batch = made(tokenizer, tmp_path, kind, unfinished=unfinished)
    (batch,) = objective.minibatches(batch)[:1]
    whole = gradient(objective, engine.models, batch, None)
    for micro in (1, 3, 4):
        parts = gradient(objective, engine.models, batch, micro)
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    some = gradient(objective, engine.models, batch.rows(0, batch.num_rows // 2), 3)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, some, strict=True)) > 1e-4


def test_answers_without_an_end_are_penalised_or_left_out(tokenizer, tmp_path):
    batches = {how: made(tokenizer, tmp_path, "grpo", unfinished=how)[2] for how in ("keep", "mask", "penalise")}
    finished = batches["keep"].columns["finished"]
    assert 0 < finished.sum() < len(finished), "the case needs both kinds of answers"
    loss = batches["keep"].columns["reward"] - batches["penalise"].columns["reward"]
    torch.testing.assert_close(loss, 1 - finished)
    assert batches["mask"].texts.mask.any(1).tolist() == finished.bool().tolist()
    assert bool(batches["keep"].texts.mask.any(1).all())


def test_rejection_keeps_the_best_of_each_prompt(tokenizer, tmp_path):
    _, _, all_rows = made(tokenizer, tmp_path, "grpo")
    _, engine, kept = made(tokenizer, tmp_path, "rejection")
    rewards = all_rows.columns["reward"].view(-1, 3)
    torch.testing.assert_close(kept.columns["kept_reward"], rewards.amax(1))
    torch.testing.assert_close(kept.columns["reward"], rewards.mean(1))
    objective, _, two = made(tokenizer, tmp_path, "rejection", keep=2)
    torch.testing.assert_close(two.columns["kept_reward"].view(-1, 2), rewards.sort(1, descending=True).values[:, :2])
    expected = torch.stack([-naive_log_probs(engine.models[POLICY], ids, places).sum() for _, places, ids in rows_of(two)]).sum()
    torch.testing.assert_close(total(objective, engine.models, two), expected / two.texts.num_targets, rtol=0, atol=1e-10)


def test_a_reward_model_reads_the_last_token_of_the_whole_text(tokenizer, tmp_path):
    settings = GRPOSettings(reward="judge", rewards={"length": {"most": 5, "weight": 2.0}}, samples=3, max_tokens=9, beta=0.0)
    objective = GRPO(replaced := settings)
    scorer = online.scorer_of(4)
    engine = online.rollouts_of(tokenizer, {"reward": scorer})
    batch = objective.rollout(engine, online.prompts_of(tokenizer))
    with torch.no_grad():
        for row, _, ids in rows_of(batch):
            score = scorer.score(scorer(ids[None]).hidden)[0, -1, 0]
            torch.testing.assert_close(batch.columns["reward_model"][row].double(), score, rtol=0, atol=1e-5)
    penalty = 1 - batch.columns["finished"]
    parts = batch.columns["reward_model"] + 2 * batch.columns["reward_length"] - penalty
    torch.testing.assert_close(batch.columns["reward"], parts)
    assert objective.roles["reward"].trained is False
    assert replaced.reward == "judge"
    with torch.no_grad():
        scorer.score.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="the reward model judge gave a reward that is not a finite number"):
        objective.rollout(engine, online.prompts_of(tokenizer))


def test_answers_that_never_end_are_an_error(tokenizer, tmp_path):
    settings = GRPOSettings(rewards=online.judge_of(tmp_path), samples=2, max_tokens=1, beta=0.0)
    engine = online.rollouts_of(tokenizer, {}, max_tokens=1, stop=())
    prompts = online.prompts_of(tokenizer)
    with pytest.raises(UserError, match="not one of the 10 answers of step 1 ended within 1 tokens"):
        GRPO(settings).rollout(engine, prompts)
    GRPO(GRPOSettings(**settings.model_dump() | {"unfinished": "keep"})).rollout(engine, prompts)


class Twice(World):
    """Two processes that see the same."""

    def sum(self, tensor):
        return tensor.mul_(2)


@pytest.fixture
def ends(tokenizer, tmp_path):
    """An objective, and a function that hands it answers as one of the steps of a run: those of a count that end, and those that do not."""
    objective = Rejection(RejectionSettings(rewards=online.judge_of(tmp_path), samples=2, max_tokens=3))
    engine = online.rollouts_of(tokenizer, {}, max_tokens=3)
    prompts = online.prompts_of(tokenizer)

    def step(number, ended, unended, objective=objective, world=None):
        written = [Sampled((1,), "a", True)] * ended + [Sampled((1, 2, 3), "abc", False)] * unended
        objective._check_ends(replace(engine, world=world or World()), replace(prompts, step=number), [written])

    return objective, step


def test_unfinished_answers_are_counted_over_steps_and_processes(ends):
    objective, step = ends
    step(0, 0, 4)
    again = Rejection(objective.settings)
    again.load_state(objective.state())
    for each in (objective, again):
        with pytest.raises(UserError, match="not one of the last 8 answers up to step 2 ended within 3 tokens"):
            step(1, 0, 4, each)
    step(1, 0, 4, Rejection(objective.settings))
    # Where some have ended, it takes more of them.
    other = Rejection(objective.settings)
    step(0, 1, 9, other)
    assert other.state() == {"unfinished": 0, "ended": True}
    step(1, 0, 31, other)
    step(-1, 0, 31, other)
    assert other.unfinished == 31, "held-out prompts are no part of the count"
    with pytest.raises(UserError, match="the last 32 answers up to step 3"):
        step(2, 0, 1, other)
    with pytest.raises(UserError, match="the 32 answers to held-out prompts"):
        step(-1, 0, 32, other)
    with pytest.raises(UserError, match="the 8 answers of step 1"):
        step(0, 0, 4, Rejection(objective.settings), Twice())
    one = Rejection(objective.settings)
    one.load_state({})
    assert one.state() == {"unfinished": 0, "ended": False}


def test_the_controller_holds_the_divergence(tokenizer, tmp_path):
    objective, _, batch = made(tokenizer, tmp_path, "ppo", beta=0.2, target=1e-6)
    assert objective.beta == pytest.approx(0.2 * 1.02)
    assert batch.columns["beta"].tolist() == pytest.approx([0.2] * 10)  # this rollout was priced as it began
    other = PPO(objective.settings)
    other.load_state(objective.state())
    assert other.beta == objective.beta != PPO(objective.settings).beta


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_answers_that_are_left_out_do_not_lower_the_divergence(tokenizer, tmp_path, kind):
    objective, engine, batch = made(tokenizer, tmp_path, kind, unfinished="mask")
    learned = batch.texts.mask.any(1)
    assert 0 < learned.sum() < len(learned), "the case needs both kinds of answers"
    _, metrics = objective.loss(engine.models, batch)
    _, those = objective.loss(engine.models, batch.pick(learned.nonzero()[:, 0]))
    found, expected = (float(each["answer_kl"].sum / each["answer_kl"].count) for each in (metrics, those))
    assert found == pytest.approx(expected, rel=1e-6)
    assert metrics["answer_kl"].sum / batch.num_rows != pytest.approx(expected, rel=1e-3), "control"


def test_the_controller_sees_the_answers_that_are_learned_from(tokenizer, tmp_path):
    """A target between the divergence of those and the one that the others would dilute."""
    _, _, batch = made(tokenizer, tmp_path, "ppo", unfinished="mask", beta=0.2)
    learned, nats = batch.texts.mask.any(1), float(batch.columns["answer_kl"].sum())
    assert nats > 0
    target = nats / (float(learned.sum()) * len(learned)) ** 0.5
    objective, *_ = made(tokenizer, tmp_path, "ppo", unfinished="mask", beta=0.2, target=target)
    assert objective.beta > 0.2


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rejection"])
def test_held_out_prompts_are_measured_by_their_reward(tokenizer, tmp_path, kind):
    objective, engine, _ = made(tokenizer, tmp_path, kind)
    prompts = replace(online.prompts_of(tokenizer), step=-1)
    terms, metrics = objective.measure(engine, prompts)
    again, _ = objective.measure(engine, prompts)
    (term,) = terms.values()
    assert term.sum / term.count == -metrics["reward"].sum / metrics["reward"].count
    assert again["unrewarded"].sum == term.sum
