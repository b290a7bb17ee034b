"""A mixture of experts against its naive twin, its routes against worked examples, its losses against their definitions."""

import math

import pytest
import torch

from weft.nn import Step, build, initialise
from weft.nn.experts import naive_experts
from weft.nn.grouped import grouped_linear, naive_grouped_linear, torch_grouped_linear
from weft.nn.mixer import Site, build_part
from weft.nn.router import Routing, losses, statistics, within_capacity
from weft.spec import Experts, RMSNorm, model_spec
from weft.spec.model import Dropout

DIM = 16
KINDS = {
    "mixtral": {"experts": 5, "top_k": 2},
    "unnormalised": {"experts": 5, "top_k": 3, "normalise": False, "scale": 1.7},
    "v3": {
        "experts": 6,
        "top_k": 2,
        "shared": 2,
        "score": "sigmoid",
        "groups": 3,
        "top_groups": 2,
        "group_score": "top2",
        "choice_bias": True,
    },
    "one": {"experts": 1, "top_k": 1},
}


def make(dtype=torch.float64, **fields):
    spec = Experts(**{"hidden": 11, **fields})
    module = build_part(spec, Site(DIM, RMSNorm(), Dropout(), 0.4, 0.3)).to(dtype)
    initialise(module, seed=0)
    if module.router.choice_bias is not None:
        module.router.choice_bias.copy_(torch.linspace(-0.3, 0.3, spec.experts))
    return module


def inputs(batch=3, length=7, dtype=torch.float64, seed=0):
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_of(x, lengths=None):
    return Step.parallel(x[..., 0].long(), None if lengths is None else torch.tensor(lengths))


def routing(logits, bias=None, **fields):
    spec = Experts(hidden=1, experts=len(logits[0]), **fields)
    return Routing(torch.tensor(logits, dtype=torch.float64), spec, None if bias is None else torch.tensor(bias, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_those_of_the_naive_twin(kind):
    module, x, weights = make(**KINDS[kind]), inputs(), inputs(seed=1)
    found = []
    for run in (lambda x: module(x, step_of(x))[0], lambda x: naive_experts(module, x.flatten(0, 1)).view_as(x)):
        module.zero_grad()
        given = x.clone().requires_grad_()
        y = run(given)
        (y * weights).sum().backward()
        found.append([y.detach(), given.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    with torch.no_grad():  # control: the experts differ
        module.units.down.copy_(module.units.down.flip(0))
        changed = (module(x, step_of(x))[0] - found[0][0]).abs().max()
    assert (changed > 1e-3) == (kind != "one")


@pytest.mark.parametrize("ends", [[4, 4, 9, 13], [0, 0, 0, 13], [2, 5, 6, 11], [0, 0, 0, 0]])
def test_grouped_products_equal_the_definition(ends):
    """Groups without rows, and rows that belong to none, included."""
    x, weight, outer = inputs(1, 13)[0], inputs(4, 5, seed=1), torch.randn(13, 5, dtype=torch.float64)
    found = []
    for product in (grouped_linear, naive_grouped_linear):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product(a, b, torch.tensor(ends, dtype=torch.int32))
        ((y * outer).sum() + 0 * (a.sum() + b.sum())).backward()  # the twin's graph has no weight where no row meets one
        found.append([y.detach(), a.grad, b.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ends", [[4, 4, 9, 13], [2, 5, 6, 11]])
def test_torchs_own_grouped_product_is_the_same(ends):
    """What runs on CUDA in 16 bits, here in float32."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    x, weight, outer = inputs(1, 13, torch.float32)[0], inputs(4, 8, torch.float32, seed=1), torch.randn(13, 8)
    found = []
    for product in (torch_grouped_linear, naive_grouped_linear):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product(a, b, torch.tensor(ends, dtype=torch.int32))
        (y * outer).sum().backward()
        found.append([y.detach(), a.grad, b.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_16_bit_rows_do_not_depend_on_company():
    module, x = make(torch.bfloat16, experts=5, top_k=2, shared=1), inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        together = module(x, step_of(x))[0]
        for row in range(3):
            for length in (1, 2, 5, 7):
                part = x[row : row + 1, :length]
                assert torch.equal(module(part, step_of(part))[0], together[row : row + 1, :length])
    assert not torch.equal(together[0], together[1])


def test_padding_is_counted_nowhere():
    fields = {"experts": 4, "top_k": 2, "balance_loss": 1.0, "z_loss": 1.0, "capacity": 0.5}
    module, x = make(**fields).train(), inputs()
    dirty = x.clone()
    dirty[1, 3:], dirty[2] = 100.0, -100.0
    found = [module(each, step_of(each, [7, 3, 0])) for each in (x, dirty)]
    for (y, side), (other, theirs) in [found]:
        assert torch.equal(y[0], other[0])
        assert torch.equal(y[1, :3], other[1, :3])
        assert set(side.aux) == {"chosen", "entropy", "tokens", "balance", "router_z", "dropped"}
        for name, value in side.aux.items():
            torch.testing.assert_close(value, theirs.aux[name], rtol=0, atol=1e-12)
    assert found[0][1].aux["tokens"] == 10
    assert found[0][1].aux["chosen"].sum() == 20
    full = module(x, step_of(x))[1].aux  # control: the same tokens, not marked as padding
    assert full["tokens"] == 21
    assert abs(full["balance"] - found[0][1].aux["balance"]) > 1


def test_weights_of_the_chosen():
    logits = [[1.0, 3.0, 2.0, -1.0]]
    mixtral = routing(logits, top_k=2)
    assert mixtral.chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(mixtral.weights[0], torch.softmax(torch.tensor([3.0, 2.0], dtype=torch.float64), 0))
    plain = routing(logits, top_k=2, normalise=False, scale=2.0)
    torch.testing.assert_close(plain.weights[0], 2 * torch.softmax(torch.tensor(logits[0], dtype=torch.float64), 0)[[1, 2]])
    sigmoid = routing(logits, top_k=2, score="sigmoid")
    high, low = 1 / (1 + math.exp(-3.0)), 1 / (1 + math.exp(-2.0))
    torch.testing.assert_close(sigmoid.weights[0], torch.tensor([high, low], dtype=torch.float64) / (high + low))


def test_the_bias_changes_the_choice_and_not_the_weights():
    logits = [[1.0, 3.0, 2.0, -1.0]]
    moved = routing(logits, bias=[0.0, -1.0, 0.0, 0.0], top_k=2, score="sigmoid", normalise=False)
    assert moved.chosen.tolist() == [[2, 0]]
    torch.testing.assert_close(moved.weights[0], torch.sigmoid(torch.tensor([2.0, 1.0], dtype=torch.float64)))


def test_choices_stay_within_the_best_groups():
    scores = [[5.0, 0.0, 4.0, 3.9, 1.0, 1.0]]
    one = {"top_k": 2, "groups": 3, "top_groups": 1}
    assert routing(scores, **one).chosen.tolist() == [[0, 1]]  # by the best of a group, the first
    assert routing(scores, **one, group_score="top2", score="sigmoid").chosen.tolist() == [[2, 3]]  # by the sum of two, the second
    assert routing(scores, top_k=2).chosen.tolist() == [[0, 2]]


def test_the_balance_loss_is_one_a_token_where_experts_are_chosen_alike_and_more_where_not():
    even = routing([[1.0, 0.0], [0.0, 1.0]] * 4, top_k=1)
    spec = Experts(experts=2, top_k=1, hidden=1, balance_loss=1.0)
    valid = torch.ones(2, 4, dtype=torch.bool)
    assert losses(even, valid, spec)["balance"] == pytest.approx(8.0)
    lopsided = routing([[20.0, 0.0]] * 8, top_k=1)
    assert losses(lopsided, valid, spec)["balance"] == pytest.approx(16.0)


def test_the_sequence_form_adds_up_over_rows_and_the_batch_form_does_not():
    x, differences = inputs(), {}
    for over in ("sequence", "batch"):
        module = make(experts=4, top_k=2, balance_loss=1.0, balance_over=over).train()
        whole, *parts = (module(each, step_of(each))[1].aux["balance"] for each in (x, x[:1], x[1:]))
        differences[over] = abs(whole - sum(parts)).item()
    assert differences["sequence"] < 1e-10
    assert differences["batch"] > 1e-3


def test_z_loss_and_statistics_follow_their_definitions():
    logits = [[1.0, 3.0, 2.0], [0.5, 0.0, -1.0]]
    routes, valid = routing(logits, top_k=2), torch.tensor([True, False])
    spec = Experts(experts=3, top_k=2, hidden=1, z_loss=1.0)
    z = math.log(sum(map(math.exp, logits[0]))) ** 2
    assert losses(routes, valid[None], spec)["router_z"] == pytest.approx(z)
    stats = statistics(routes, valid)
    shares = torch.softmax(torch.tensor(logits[0]), 0)
    assert stats["chosen"].tolist() == [0, 1, 1]
    assert stats["entropy"] == pytest.approx(-(shares * shares.log()).sum().item())
    assert stats["tokens"] == 1


def test_experts_take_tokens_in_order_until_they_are_full():
    spec = Experts(experts=2, top_k=1, hidden=1, capacity=0.75)  # of 4 valid tokens, 2 an expert
    chosen = torch.tensor([[0], [0], [0], [1], [0]])
    valid = torch.tensor([True, False, True, True, True])
    assert within_capacity(chosen, valid, spec).flatten().tolist()[0::2] == [True, True, False]
    assert within_capacity(chosen, valid, spec)[3]
    module, x = make(experts=2, top_k=1, capacity=0.5), inputs()
    trained, evaluated = module.train()(x, step_of(x)), module.eval()(x, step_of(x))
    assert trained[1].aux["dropped"] > 0
    assert "dropped" not in evaluated[1].aux
    assert (trained[0] == 0).all(-1).sum() == trained[1].aux["dropped"]
    assert not (evaluated[0] == 0).all(-1).any()


def test_the_bias_moves_after_a_step_towards_balance():
    module = make(experts=4, top_k=1, score="sigmoid", choice_bias=True, bias_speed=0.25)
    module.router.choice_bias.zero_()
    said = module.after_step(
        {"chosen": torch.tensor([9.0, 1.0, 5.0, 5.0]), "entropy": torch.tensor([30.0]), "tokens": torch.tensor([20.0])}
    )
    assert {name: round(value.item(), 6) for name, value in said.items()} == {
        "expert_share_min": 0.2,
        "expert_share_max": 1.8,
        "router_entropy": 1.5,
    }
    assert module.router.choice_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_the_bias_keeps_its_precision_in_a_model_of_16_bits():
    layer = {"channel": {"type": "experts", "experts": 4, "top_k": 1, "hidden": 8, "choice_bias": True}}
    model = build(model_spec({"vocab": 7, "dim": 8, "layers": [layer]}), dtype=torch.bfloat16)
    assert model.blocks[0].channel.router.choice_bias.dtype == torch.float32
    assert model.blocks[0].channel.router.weight.dtype == torch.bfloat16
