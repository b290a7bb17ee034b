"""AdamW against torch's, Muon against torch's and against the singular values it promises, and the slices of fused weights."""

import math

import pytest
import torch
import train_cases as cases

from weft.errors import UserError
from weft.spec import model_spec
from weft.train.matrices import trained_weights
from weft.train.muon import Muon, orthogonalise
from weft.train.optim import Optimizer, clip_gradients
from weft.train.settings import OptimSettings

HYBRID = [
    {"mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 20}},
    {"mixer": {"type": "mamba", "state_dim": 3, "dt_rank": 2}},
    {"mixer": {"type": "lstm", "hidden": 12}, "channel": {"type": "mlp", "hidden": 24}},
    {"mixer": {"type": "gru"}, "channel": {"type": "rwkv_channel_mix", "hidden": 24}},
]


def _with_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def _copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_adamw_is_torchs_adamw():
    settings = OptimSettings(lr=3e-3, weight_decay=0.2, betas=(0.8, 0.9))
    ours, theirs = _with_gradients(cases.model_of()), _with_gradients(cases.model_of())
    optimizer = Optimizer(ours, settings)
    decayed = [p for name, p in theirs.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    others = [p for name, p in theirs.named_parameters() if not (name.startswith("blocks") and p.ndim == 2)]
    oracle = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], 3e-3, (0.8, 0.9), 1e-8, 0.2)
    for seed, factor in ((1, 1.0), (2, 0.5)):
        for group in oracle.param_groups:
            group["lr"] = 3e-3 * factor
        _with_gradients(theirs, seed)
        oracle.step()
        _with_gradients(ours, seed)
        optimizer.step(factor)
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=name)
        assert found.grad is None
    # Negative control: decaying every weight alike is another update.
    alike = _with_gradients(cases.model_of(), 1)
    torch.optim.AdamW(alike.parameters(), 3e-3, (0.8, 0.9), 1e-8, 0.2).step()
    again = _with_gradients(cases.model_of(), 1)
    Optimizer(again, settings).step(1.0)
    assert (alike.embed.weight - again.embed.weight).abs().max() > 1e-5


def test_orthogonalised_matrices_have_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 40), (3, 40, 16), (1, 7, 7)):
        matrices = torch.randn(*shape, generator=generator)
        moved = orthogonalise(matrices).float()
        values = torch.linalg.svdvals(moved)
        assert values.max() < 1.3
        assert values.min() > 0.6 or shape[1] == shape[2], "square random matrices have values near zero, which five steps cannot lift"
        exact = torch.linalg.svd(matrices, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(moved.flatten(), (exact.U @ exact.Vh).flatten(), dim=0) > 0.95
        assert torch.linalg.svdvals(matrices).max() > 3, "negative control: the matrices were far from orthogonal"


def test_muon_is_torchs_muon_on_weights_that_are_not_fused():
    ours, theirs = cases.model_of(torch.float32), cases.model_of(torch.float32)
    weights = [weight for weight in trained_weights(ours) if weight.kind == "matrix" and len(weight.rows) == 1]
    named = dict(theirs.named_parameters())
    muon = Muon(weights, weight_decay=0.1, momentum=0.9)
    oracle = torch.optim.Muon([named[w.name] for w in weights], 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    for seed in (1, 2, 3):
        _with_gradients(ours, seed)
        muon.step(0.02)
        _with_gradients(theirs, seed)
        oracle.step()
    assert len(weights) == 4
    for weight in weights:
        torch.testing.assert_close(weight.parameter, named[weight.name], rtol=0, atol=3e-4)
        assert (weight.parameter - dict(cases.model_of(torch.float32).named_parameters())[weight.name]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["blocks.0.mixer.qkv.weight", "blocks.0.channel.gate_up.weight"])
def test_fused_weights_are_orthogonalised_slice_by_slice(name):
    model = _with_gradients(cases.model_of(torch.float32))
    weight = next(each for each in trained_weights(model) if each.name == name)
    before, gradient = weight.parameter.detach().clone(), weight.parameter.grad.clone()
    Muon([weight], weight_decay=0.0, momentum=0.0).step(1.0)
    moved = before - weight.parameter.detach()
    sizes = (16, 8, 8) if "qkv" in name else (24, 24)
    assert weight.rows == sizes
    for part, source in zip(moved.split(sizes), gradient.split(sizes), strict=True):
        scale = 0.2 * math.sqrt(max(part.shape))
        torch.testing.assert_close(part, orthogonalise(source[None])[0].float() * scale, rtol=0, atol=2e-2 * scale)
    # Negative control: the fused matrix as a whole is another direction.
    whole = orthogonalise(gradient[None])[0].float() * 0.2 * math.sqrt(max(gradient.shape))
    assert (moved - whole).abs().max() > 0.1


def test_an_update_of_muon_is_as_large_as_adamws_whatever_its_shape():
    model = _with_gradients(cases.model_of(torch.float32, dim=32))
    before = _copies(model)
    Optimizer(model, OptimSettings(name="muon", lr=0.01, weight_decay=0.0)).step(1.0)
    for weight in trained_weights(model):
        if weight.kind == "matrix":
            update = (weight.parameter - before[weight.name]).square().mean().sqrt()
            assert 0.5 < update / (0.2 * 0.01) < 1.3, weight.name


def test_every_weight_of_every_layer_kind_has_its_place():
    model = cases.model_of(torch.float32, layers=HYBRID, tie_embeddings=False, position={"type": "learned", "length": 24})
    kinds = {weight.name: weight.kind for weight in trained_weights(model)}
    assert set(kinds) == {name for name, _ in model.named_parameters()}
    assert [name for name, kind in kinds.items() if kind == "table"] == ["embed.weight", "position.weight"]
    assert [name for name, kind in kinds.items() if kind == "head"] == ["head.weight"]
    matrices = {name for name, kind in kinds.items() if kind == "matrix"}
    assert {"blocks.1.mixer.in_proj.weight", "blocks.2.mixer.weight_hh", "blocks.3.channel.receptance.weight"} <= matrices
    vectors = {"blocks.1.mixer.A_log", "blocks.1.mixer.conv.weight", "blocks.2.mixer.bias_ih", "norm.weight", "blocks.3.channel.mix_key"}
    assert vectors <= {name for name, kind in kinds.items() if kind == "vector"}
    rows = {weight.name: weight.rows for weight in trained_weights(model)}
    assert rows["blocks.2.mixer.weight_ih"] == (12,) * 4
    assert rows["blocks.3.mixer.weight_hh"] == (16,) * 3
    assert rows["blocks.1.mixer.x_proj.weight"] == (2, 3, 3)
    Optimizer(_with_gradients(model), OptimSettings(name="muon")).step(1.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_is_taken_over_exactly(name):
    settings = OptimSettings(name=name, lr=0.01)
    straight, stopped = cases.model_of(torch.float32), cases.model_of(torch.float32)
    first, second = Optimizer(straight, settings), Optimizer(stopped, settings)
    for optimizer, model in ((first, straight), (second, stopped)):
        for seed in (1, 2):
            _with_gradients(model, seed)
            optimizer.step(1.0)
    state = {key: value.clone() for key, value in second.state().items()}
    resumed = Optimizer(stopped, settings)
    resumed.load(state)
    fresh_model = cases.model_of(torch.float32)
    fresh_model.load_state_dict(stopped.state_dict())
    fresh = Optimizer(fresh_model, settings)
    for optimizer, model in ((first, straight), (resumed, stopped), (fresh, fresh_model)):
        _with_gradients(model, 3)
        optimizer.step(1.0)
    for expected, found in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert not torch.equal(straight.embed.weight, fresh_model.embed.weight), "negative control: without the state it is another step"
    with pytest.raises(KeyError):
        resumed.load({key: value for key, value in state.items() if key != "embed.weight.exp_avg"})


def test_clipping_is_by_the_norm_of_all_gradients():
    model = _with_gradients(cases.model_of())
    optimizer = Optimizer(model, OptimSettings(clip=0.5))
    norm = math.sqrt(sum(float(gradient.square().sum()) for _, gradient in cases.gradients(model)))
    assert clip_gradients(optimizer).item() == pytest.approx(norm)
    assert math.sqrt(sum(float(gradient.square().sum()) for _, gradient in cases.gradients(model))) == pytest.approx(0.5, rel=1e-5)
    free = _with_gradients(cases.model_of())
    assert clip_gradients(Optimizer(free, OptimSettings(clip=None))).item() == pytest.approx(norm)
    assert math.sqrt(sum(float(gradient.square().sum()) for _, gradient in cases.gradients(free))) == pytest.approx(norm)


def test_frozen_weights_stay_and_a_frozen_model_is_refused():
    model = cases.model_of(torch.float32)
    model.embed.requires_grad_(False)
    before = model.embed.weight.clone()
    _with_gradients(model)
    Optimizer(model, OptimSettings(name="muon")).step(1.0)
    assert torch.equal(model.embed.weight, before)
    with pytest.raises(UserError, match="every weight of the model is frozen"):
        Optimizer(model.requires_grad_(False), OptimSettings())


def test_a_spec_of_another_family_has_fused_rows_that_add_up():
    spec = model_spec(
        {"vocab": 9, "dim": 8, "context": 8, "layers": [{"cross": {"type": "cross_attention", "heads": 2, "memory_length": 3}}]}
    )
    from weft.nn import build

    assert {w.name: w.rows for w in trained_weights(build(spec))}["blocks.0.cross.kv.weight"] == (8, 8)
