"""Training a mixture of experts: its losses are terms like others, its statistics are metrics, its bias moves and is resumed."""

import pytest
import torch
import train_cases as cases

from weft.nn import Step
from weft.objectives.auxiliary import Auxiliary
from weft.objectives.next_token import NextToken
from weft.train.history import History, read_metrics
from weft.train.job import Compute
from weft.train.matrices import Weight, trained_weights
from weft.train.muon import Muon
from weft.train.objective import POLICY
from weft.train.parallel import World
from weft.train.settings import SaveSettings
from weft.train.trainer import Trainer
from weft.train.window import loss_function, open_window, run_window

EXPERTS = {"type": "experts", "experts": 4, "top_k": 2, "hidden": 12, "shared": 1, "balance_loss": 0.5, "z_loss": 0.1}
BIASED = {**EXPERTS, "score": "sigmoid", "choice_bias": True, "bias_speed": 0.05, "z_loss": 0.0}


def layers(**changes):
    mixer = cases.LLAMA["layers"][0]["mixer"]
    sparse = {"mixer": mixer, "channel": {**EXPERTS, **changes}}
    return [{"mixer": mixer, "channel": {"type": "gated", "hidden": 24}}, sparse, sparse]


def gradients(micro, **changes):
    model = cases.model_of(layers=layers(**changes)).train()
    objective = NextToken(spec=model.spec)
    compute = loss_function(objective, {POLICY: model}, torch.float64)
    window, _ = open_window(objective, cases.batch_of(), micro, torch.device("cpu"), World())
    sums = run_window(window, compute, list(model.parameters()), World())
    history = History(World())
    history.note({"step": 1}, window.counts, sums, {"grad_norm": torch.tensor(0.0)})
    return history.fetch()[0], dict(cases.gradients(model)), sums.stats


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_equals_one_batch(micro):
    whole_row, whole, whole_stats = gradients(None)
    row, parts, stats = gradients(micro)
    for name in ("loss", "next_token", "balance", "router_z"):
        assert row[name] == pytest.approx(whole_row[name], abs=1e-10)
    assert whole_row["loss"] == pytest.approx(whole_row["next_token"] + 2 * 0.5 * whole_row["balance"] + 2 * 0.1 * whole_row["router_z"])
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=0, atol=1e-10)
    assert set(stats) == {f"policy/{i}.channel.{name}" for i in (1, 2) for name in ("chosen", "entropy", "tokens")}
    for name, expected in whole_stats.items():
        torch.testing.assert_close(stats[name], expected, rtol=0, atol=1e-8)


def test_the_batch_form_depends_on_the_micro_batch():
    """Control for the test above, and what is said of `balance_over: batch`."""
    (whole, _, _), (parts, _, _) = gradients(None, balance_over="batch"), gradients(1, balance_over="batch")
    assert abs(whole["balance"] - parts["balance"]) > 1e-4
    assert whole["next_token"] == pytest.approx(parts["next_token"], abs=1e-10)


def test_padding_of_a_packed_batch_is_counted_nowhere():
    batch = cases.batches_of(mode="pad").batch(0)
    assert batch.num_tokens < batch.tokens.numel()
    _, _, stats = gradients(None)
    packed = cases.batch_of()
    assert stats["policy/1.channel.tokens"] == packed.num_tokens
    assert stats["policy/1.channel.chosen"].sum() == 2 * packed.num_tokens


def test_an_objective_that_forgot_its_models_losses_is_noticed():
    model, batch = cases.model_of(layers=layers()).train(), cases.batch_of()
    with pytest.raises(AssertionError, match=r"without the auxiliary losses of its model: 1\.channel\.balance"):
        NextToken().loss({POLICY: model}, batch)
    terms, _ = NextToken(spec=model.spec).loss({POLICY: model.eval()}, batch)
    assert list(terms) == ["next_token"], "held-out losses are of the objective alone"


def test_layers_of_other_weights_share_a_term():
    first, second = layers()[1], layers(balance_loss=0.25)[1]
    auxiliary = Auxiliary(cases.spec_of(layers=[first, second]))
    valid = torch.ones(1, 3, dtype=torch.bool)
    names = {f"{i}.channel.{name}": torch.tensor(1.0 + i) for i in (0, 1) for name in ("balance", "router_z")}
    term = auxiliary.terms(names, valid)["balance"]
    assert term.weight * term.sum == pytest.approx(0.5 * 1 + 0.25 * 2)
    assert term.weight == pytest.approx(0.75)


def job(out, steps):
    model = cases.model_of(layers=layers(**BIASED))
    return cases.job_of(
        out,
        steps=steps,
        models={POLICY: model},
        objective=NextToken(spec=model.spec),
        compute=Compute(torch.device("cpu"), torch.float64),
        micro=3,
        save=SaveSettings(every=2, minutes=None),
    )


def finish(job):
    try:
        return Trainer(job).run()
    finally:
        job.folder.release()


def test_the_bias_moves_after_steps_and_a_resumed_run_has_the_same_bits(tmp_path):
    straight, first = job(tmp_path / "straight", 6), job(tmp_path / "resumed", 6)
    finish(straight)
    steps, trainer = [], Trainer(first)
    after = trainer._after_step

    def stop_early(*facts):
        steps.append(1)
        return after(*facts) or len(steps) == 3

    trainer._after_step = stop_early
    trainer.run()
    first.folder.release()
    again = job(tmp_path / "resumed", 6)
    finish(again)
    found, expected = again.models[POLICY].state_dict(), straight.models[POLICY].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    bias = straight.models[POLICY].blocks[1].channel.router.choice_bias
    assert bias.abs().max() > 0.04
    assert (bias / 0.05 - (bias / 0.05).round()).abs().max() < 1e-5
    rows = [row for row in read_metrics(tmp_path / "straight/metrics.jsonl") if "loss" in row]
    for row in rows:
        assert 0 <= row["expert_share_min"] <= 1 <= row["expert_share_max"] <= 2
        assert 0 < row["router_entropy"] < torch.tensor(4.0).log()
        assert row["balance"] >= 0.5


def test_the_bias_balances_without_a_loss():
    """A router that begins lopsided: the least used expert comes nearer to its share."""
    model = cases.model_of(layers=layers(**{**BIASED, "balance_loss": 0.0})).eval()
    for layer in (1, 2):
        model.blocks[layer].channel.router.choice_bias.copy_(torch.tensor([0.4, 0.0, 0.0, -0.4]))
    tokens, shares = cases.batch_of().tokens, []
    for _ in range(40):
        with torch.no_grad():
            aux = model(tokens, Step.parallel(tokens)).aux
        shares.append(model.after_step(aux)["expert_share_min"].item())
    assert shares[0] < 0.25
    assert min(shares[-3:]) > 0.7


def test_muon_treats_each_matrix_of_each_expert_by_itself():
    """Twin: the experts' matrices as parameters of their own."""
    model = cases.model_of(layers=layers())
    kinds = {weight.name: weight for weight in trained_weights(model)}
    assert kinds["blocks.1.channel.units.gate_up"].rows == (12,) * 8
    assert kinds["blocks.1.channel.units.down"].kind == kinds["blocks.1.channel.router.weight"].kind == "matrix"
    stacked = model.blocks[1].channel.units.gate_up
    alone = [torch.nn.Parameter(part.clone()) for expert in stacked for part in expert.detach().chunk(2)]
    together = Muon([kinds["blocks.1.channel.units.gate_up"]])
    apart = Muon([Weight(str(i), parameter, "matrix", (12,)) for i, parameter in enumerate(alone)])
    for seed in range(2):
        stacked.grad = torch.randn(stacked.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for parameter, part in zip(alone, (part for expert in stacked.grad for part in expert.chunk(2)), strict=True):
            parameter.grad = part.clone()
        together.step(0.1)
        apart.step(0.1)
    torch.testing.assert_close(torch.cat([parameter.detach() for parameter in alone]), stacked.detach().flatten(0, 1), rtol=0, atol=1e-6)


def test_statistics_are_summed_over_processes(monkeypatch):
    """The bias of all processes must move alike: by what all of them counted."""
    _, _, alone = gradients(None)
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor.mul_(2))  # as if another had the same batch
    _, _, both = gradients(None)
    for name, value in alone.items():
        torch.testing.assert_close(both[name], 2 * value)
