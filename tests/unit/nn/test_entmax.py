"""Alpha-entmax against its definition, finite differences and the package of its authors, and attention by it."""

import entmax as reference
import pytest
import torch

from weft.data.packing import PackedBatch
from weft.errors import UserError
from weft.nn import Arena, Runner, Step, build
from weft.nn.entmax import attend_entmax, attend_entmax_naive, entmax, entmax_naive
from weft.objectives.next_token import NextToken
from weft.spec import EntmaxAttention, model_spec, parse

ALPHAS = [1.05, 1.3, 1.5, 1.9, 2.0, 3.0]


def scores(keys, scale=1.0, rows=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(keys)
    return (torch.randn(rows, keys, generator=generator, dtype=torch.float64) * scale).to(dtype)


def everything(x):
    return torch.ones_like(x, dtype=torch.bool)


@pytest.mark.parametrize("keys", [1, 2, 7, 65, 1001])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_its_definition_and_the_package(alpha, keys):
    for scale in (1e-3, 1.0, 30.0):
        x = scores(keys, scale)
        p = entmax(x, alpha)
        assert (p - entmax_naive(x, alpha, everything(x))).abs().max() < 1e-11
        assert (p - reference.entmax_bisect(x, alpha, n_iter=70)).abs().max() < 1e-11
        assert (p.sum(-1) - 1).abs().max() < 1e-13
    if keys > 2:
        assert (entmax(x / 30, alpha) - entmax(x / 30, alpha + 0.01)).abs().max() > 1e-6, "control: another alpha shows"


@pytest.mark.parametrize("keys", [7, 65, 1001])
def test_sorting_bisection_and_the_package_s_exact_forms_agree(keys):
    for scale in (0.1, 5.0):
        x = scores(keys, scale)
        for alpha, theirs in ((1.5, reference.entmax15), (2.0, reference.sparsemax)):
            exact, bisected = entmax(x, alpha), entmax(x, torch.tensor([[alpha]], dtype=x.dtype), at_most_two=True)
            assert (exact - theirs(x, -1)).abs().max() < 1e-12
            assert (exact - bisected).abs().max() < 1e-12
            assert torch.equal(exact == 0, bisected == 0)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("alpha", [1.05, 1.5, 1.9, 2.0])
def test_float32_over_long_rows_stays_near_float64(alpha, scale):
    x = scores(4096, scale, dtype=torch.float32)
    p, exact = entmax(x, alpha), entmax(x.double(), alpha)
    assert (p - exact).abs().max() < 3e-7
    assert ((p > 0) & (exact == 0)).sum() <= 2, "what is exactly zero is not a little more than zero"


@pytest.mark.parametrize("alpha", ALPHAS)
def test_masked_entries_get_exactly_zero_and_empty_rows_stay_finite(alpha):
    x = scores(9).requires_grad_()
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[2] = False
    p = entmax(x, alpha, mask)
    assert (p[~mask] == 0).all()
    assert (p[2] == 0).all()
    for row in (0, 1, 3, 4, 5):  # as if what is masked were not there
        error = (p[row, mask[row]] - entmax(x[row, mask[row]], alpha)).abs().max()
        assert error < (1e-14 if alpha <= 2 else 1e-11)  # beyond 2 a weight near zero is a root of the threshold's rounding error
    p.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~mask] == 0).all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_is_the_exact_jacobian_s(alpha):
    x = scores(7, rows=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha), x, eps=1e-7, atol=1e-6)
    theirs = torch.autograd.grad((reference.entmax_bisect(x, alpha, n_iter=70) ** 3).sum(), x)[0]
    ours = torch.autograd.grad((entmax(x, alpha) ** 3).sum(), x)[0]
    assert (ours - theirs).abs().max() < 1e-12


def test_gradient_of_alpha_against_finite_differences_and_the_package():
    x, alpha = scores(7, rows=5).requires_grad_(), torch.tensor([1.01, 1.2, 1.5, 1.8, 2.5], dtype=torch.float64)[:, None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, alpha: entmax(x, alpha), (x, alpha), eps=1e-7, atol=1e-6)
    weight = scores(7, rows=5) + 1
    ours = torch.autograd.grad((entmax(x, alpha) * weight).sum(), (x, alpha))
    theirs = torch.autograd.grad((reference.entmax_bisect(x, alpha, n_iter=70) * weight).sum(), (x, alpha))
    assert (ours[0] - theirs[0]).abs().max() < 1e-12
    assert (ours[1] - theirs[1]).abs().max() < 1e-10
    step = 1e-6  # the symmetric difference, by hand: gradcheck must not be what is wrong
    moved = [(entmax(x, alpha.detach() + sign * step) * weight).sum(-1, keepdim=True) for sign in (1, -1)]
    assert (ours[1] - (moved[0] - moved[1]) / (2 * step)).abs().max() < 1e-7
    assert ours[1].abs().min() > 1e-3, "control: there is a gradient to get wrong"


def test_gradient_of_an_alpha_near_one_survives_float32():
    x = scores(65, rows=3)
    for excess in (0.5, 0.1, 0.01):
        gradients = []
        for dtype in (torch.float64, torch.float32):
            alpha = torch.full((3, 1), 1 + excess, dtype=dtype).double().to(dtype).requires_grad_()
            (entmax(x.to(dtype), alpha, at_most_two=True) * x.to(dtype)).sum().backward()
            gradients.append(alpha.grad.double())
        assert ((gradients[0] - gradients[1]) / gradients[0]).abs().max() < 1e-3 * max(1, 0.01 / excess)


def test_alpha_towards_one_is_softmax():
    x = scores(65, 3.0)
    errors = [(entmax(x, 1 + excess) - x.softmax(-1)).abs().max().item() for excess in (1e-2, 1e-4, 1e-6, 1e-9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-4, "control: at 1.01 they differ"
    assert errors[-1] < 1e-8
    assert (entmax(x.float(), 1.0001) - x.float().softmax(-1)).abs().max() < 1e-3


# Attention


@pytest.mark.parametrize("alpha", [1.5, 1.3, 2.0, "learned"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 2), (2, 5, 7, 4, 2, 6), (3, 13, 13, 6, 1, 5)])  # B, T, K, H, G, D
def test_attention_equals_its_twin(shape, alpha):
    batch, length, keys, heads, groups, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(batch, keys, groups, width, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (torch.arange(keys) <= torch.arange(keys - length, keys)[:, None]).expand(batch, -1, -1).clone()
    mask[0, 0] = False
    alpha = torch.linspace(1.1, 1.9, heads, dtype=torch.float64) if alpha == "learned" else alpha
    mixed, weights = attend_entmax(q, k, v, mask, 0.7, alpha)
    assert (mixed - attend_entmax_naive(q, k, v, mask, 0.7, alpha)).abs().max() < 1e-11
    assert (weights.masked_select(~mask[:, None]) == 0).all()
    assert (mixed[0, 0] == 0).all()
    if keys > 1:
        assert (attend_entmax(q, k, v, mask, 0.71, alpha)[0] - mixed).abs().max() > 1e-4, "control: another scale shows"


def model(**fields):
    mixer = {"type": "entmax_attention", "heads": 4, "kv_heads": 2, "rope": {}, **fields}
    layers = [{"repeat": 2, "mixer": mixer, "channel": {"type": "gated", "hidden": 24}}]
    return build(model_spec({"vocab": 31, "dim": 16, "layers": layers, "init_std": 0.3}), dtype=torch.float64, seed=0)


def test_learned_alphas_begin_where_they_are_told_and_move():
    net = model(learn_alpha=True, alpha=1.3)
    mixer = net.layers()[0].parts()["mixer"]
    assert (mixer.alpha - 1.3).abs().max() < 1e-12
    tokens = torch.arange(20).view(2, 10)
    net(tokens).logits.square().mean().backward()
    gradient = mixer.alpha_logit.grad.clone()
    for head in range(4):  # the whole model's finite difference
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                mixer.alpha_logit[head] += sign * 1e-5
                values.append(net(tokens).logits.square().mean())
                mixer.alpha_logit[head] -= sign * 1e-5
        assert abs((values[0] - values[1]) / 2e-5 - gradient[head]) < 1e-7
    assert gradient.abs().min() > 1e-6


def test_reports_the_share_of_exact_zeros_a_head():
    net = model(alpha=2.0).eval()
    tokens = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))
    aux = net(tokens, Step.parallel(tokens, torch.tensor([12, 5]))).aux
    assert aux["0.mixer.pairs"] == 12 * 13 / 2 + 5 * 6 / 2, "padding does not count, nor what causality hides"
    assert aux["0.mixer.zeros"].shape == (4,)
    share = aux["0.mixer.zeros"] / aux["0.mixer.pairs"]
    assert (share > 0).all()
    assert (share < 1).all()
    softer = model(alpha=1.02).eval()(tokens).aux
    assert (softer["0.mixer.zeros"] == 0).all(), "control: near softmax nothing is zero"


def test_training_shows_the_shares_over_heads_and_layers():
    net, tokens = model(learn_alpha=True, alpha=1.8), torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = PackedBatch(tokens, tokens.roll(-1, 1), torch.arange(12).expand(2, -1), None, torch.ones_like(tokens, dtype=torch.bool), 0)
    _, metrics = NextToken(spec=net.spec).loss({"policy": net}, batch)
    stats = {name.removeprefix("policy/"): 2 * metric.sum for name, metric in metrics.items()}  # as if of two equal micro-batches
    said, aux = net.after_step(stats), net(tokens).aux
    shares = torch.stack([aux[f"{i}.mixer.zeros"] / aux[f"{i}.mixer.pairs"] for i in range(2)])
    assert said["zeros_min"] == shares.min()
    assert said["zeros_max"] == shares.max()
    assert (said["zeros"] - shares.mean()).abs() < 1e-7
    assert (said["alpha"] - 1.8).abs() < 1e-12
    assert said["zeros_min"] < said["zeros_max"]


@pytest.mark.parametrize("fields", [{}, {"learn_alpha": True, "window": 4}])
def test_compiles_to_one_graph(fields):
    torch._dynamo.reset()
    net, tokens = model(**fields).eval(), torch.arange(10).view(1, 10)
    with torch.no_grad():
        truth = net(tokens).logits
        trained = torch.compile(net, fullgraph=True, backend="eager", dynamic=False)(tokens).logits
        runner = torch.compile(Runner(net, Arena(net, 1, 16, 5)), fullgraph=True, backend="eager", dynamic=False)
        decoded = [runner(tokens[:, i : i + 5], torch.tensor([5])) for i in (0, 5)]
    assert (trained - truth).abs().max() < 1e-12
    assert (torch.stack(decoded, 1) - truth[:, [4, 9]]).abs().max() < 1e-12


def test_alphas_that_cannot_be_are_refused_with_a_sentence():
    for alpha in (1.0, 0.5, 0, -1):
        with pytest.raises(UserError, match=rf"alpha is {float(alpha)}; entmax takes numbers above 1"):
            parse(EntmaxAttention, {"heads": 4, "alpha": alpha}, "layer")
    with pytest.raises(UserError, match=r"alpha is 2.0 with learn_alpha; a learned alpha begins between 1 and 2"):
        parse(EntmaxAttention, {"heads": 4, "alpha": 2.0, "learn_alpha": True}, "layer")
    with pytest.raises(UserError, match="window needs causal attention"):
        parse(EntmaxAttention, {"heads": 4, "window": 3, "causal": False}, "layer")
