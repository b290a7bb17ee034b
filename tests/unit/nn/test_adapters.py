"""Adapters against weights written out: outputs, gradients, what is trained, and what they leave alone."""

import pytest
import torch
from torch.func import functional_call

from weft.errors import UserError
from weft.nn import Step, build
from weft.nn.adapters import adapter_parameters, adapters_off, attach, detach, has_adapter, merge_adapter
from weft.nn.adapters.several import SeveralLoRA, naive_several, put_several
from weft.nn.adapters.shared import Adapters
from weft.nn.linear import Linear
from weft.quant.model import dequantize, quantize
from weft.spec import Quant, model_spec
from weft.spec.adapters import IA3, BitFit, Bottleneck, Freeze, LoRA
from weft.weights.adapter_places import choose_places, find_sites
from weft.zoo import FAMILIES, family_of

SPEC = {
    "vocab": 53,
    "dim": 32,
    "context": 40,
    "norm": {"type": "rms"},
    "layers": [
        {"repeat": 2, "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 64}}
    ],
}
BIASED = {**SPEC, "layers": [{**SPEC["layers"][0], "mixer": {**SPEC["layers"][0]["mixer"], "qkv_bias": True}}]}
FORMS = {
    "lora": LoRA(rank=3, alpha=5),
    "some": LoRA(rank=3, alpha=5, targets=("q_proj", "v_proj", "layers.1.mlp.down_proj")),
    "rslora": LoRA(rank=4, alpha=2, rslora=True),
    "dora": LoRA(rank=3, alpha=5, dora=True),
    "dora of some": LoRA(rank=3, alpha=5, dora=True, targets=("k_proj", "up_proj")),
    "ia3": IA3(),
    "bottleneck": Bottleneck(size=6),
}
LINEAR = [name for name in FORMS if name != "bottleneck"]


def tokens(rows=3, length=11):
    return torch.randint(0, 53, (rows, length), generator=torch.Generator().manual_seed(5))


def base(spec=BIASED, dtype=torch.float64):
    model = build(model_spec(spec), dtype=dtype, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


def adapted(settings, spec=BIASED, dtype=torch.float64, trained=True):
    model = base(spec, dtype)
    attach(model, settings, choose_places(model, family_of(model.spec), settings), seed=1)
    if trained:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3
    return model


def written_out(model):
    """Weights of the base by name, with the adapter's change worked in the long way: one map at a time, differentiably."""
    weights = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, Linear) or linear.adapter is None:
            continue
        weight, bias, adapter = linear.weight.detach(), linear.bias, linear.adapter
        rows, biases = list(weight.unbind(0)), None if bias is None else list(bias.unbind(0))
        for i, place in enumerate(adapter.places):
            part = slice(place.start, place.start + place.rows)
            if isinstance(adapter.shared.settings, IA3):
                factor = adapter.factors[i]
                new = weight[part] * (factor if place.scales_input else factor[:, None])
                if biases is not None and not place.scales_input:
                    biases[part] = (bias[part] * factor).unbind(0)
            else:
                change = adapter.changes[i]
                new = weight[part] + adapter.settings.factor * change.b @ change.a
                if change.magnitude is not None:
                    new = change.magnitude[:, None] * new / new.norm(dim=1, keepdim=True).detach()
            rows[part] = new.unbind(0)
        weights[f"{name}.weight"] = torch.stack(rows)
        if biases is not None:
            weights[f"{name}.bias"] = torch.stack(biases)
    return weights


def loss_of(logits):
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_adapter_changes_no_bit(form, dtype):
    before = base(dtype=dtype)(tokens()).logits
    model = adapted(FORMS[form], dtype=dtype, trained=False)
    assert torch.equal(model(tokens()).logits, before)
    with torch.inference_mode():
        assert torch.equal(model(tokens()).logits, base(dtype=dtype)(tokens()).logits)
    assert not torch.equal(adapted(FORMS[form], dtype=dtype)(tokens()).logits, before)


@pytest.mark.parametrize("form", LINEAR)
@pytest.mark.parametrize("spec", [SPEC, BIASED], ids=["plain", "biased"])
def test_outputs_and_gradients_equal_those_of_weights_written_out(form, spec):
    model = adapted(FORMS[form], spec)
    found = model(tokens()).logits
    loss_of(found).backward()
    got = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    model.zero_grad()
    with adapters_off(model):
        expected = functional_call(model, written_out(model), (tokens(),)).logits
    loss_of(expected).backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-10, msg=name)
    with torch.inference_mode():  # what is kept between an engine's passes is the same, and follows its parameters
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=1e-10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    loss_of(model(tokens()).logits).backward()
    optimizer.step()
    with torch.inference_mode():
        after = model(tokens()).logits
    with adapters_off(model):
        expected = functional_call(model, written_out(model), (tokens(),)).logits
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(after, found, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", LINEAR)
def test_merging_gives_the_same_function_and_a_plain_model(form):
    model = adapted(FORMS[form])
    expected = model(tokens()).logits
    names = set(base().state_dict())
    assert set(model.state_dict()) > names
    merge_adapter(model)
    assert not has_adapter(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(base()(tokens()).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_off_and_detached_it_is_the_base_to_the_bit(form):
    before = base()(tokens()).logits
    model = adapted(FORMS[form])
    assert has_adapter(model)
    with adapters_off(model):
        assert torch.equal(model(tokens()).logits, before)
    assert not torch.equal(model(tokens()).logits, before)
    detach(model)
    assert torch.equal(model(tokens()).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_adapters_parameters_are_trained(form):
    model = adapted(FORMS[form])
    own = adapter_parameters(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(own)
    loss_of(model(tokens()).logits).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(own)


def test_the_number_of_parameters_is_that_of_the_papers():
    rank, dim, hidden = 3, 32, 64
    attention = rank * ((dim + 32) + 2 * (dim + 16) + (32 + dim))
    channel = rank * (2 * (dim + hidden) + (hidden + dim))
    counts = {"lora": 2 * (attention + channel), "ia3": 2 * (16 + 16 + hidden), "bottleneck": 4 * (2 * 6 * dim + 6 + dim)}
    counts["dora"] = counts["lora"] + 2 * (32 + 2 * 16 + 32 + 2 * hidden + dim)
    for form, count in counts.items():
        assert sum(parameter.numel() for parameter in adapter_parameters(adapted(FORMS[form])).values()) == count, form


@pytest.mark.parametrize("quant", [Quant(type="int8"), Quant(type="int4", minimum=True), Quant(type="nf4")], ids=lambda quant: quant.type)
@pytest.mark.parametrize("form", ["lora", "dora", "ia3"])
def test_an_adapter_on_a_quantised_base_equals_one_on_its_weights_in_full(form, quant):
    model = quantize(base(SPEC, torch.float32), quant)
    full = dequantize(model)
    for each in (model, full):
        attach(each, FORMS[form], choose_places(each, FAMILIES["llama"], FORMS[form]), seed=1)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in adapter_parameters(each).values():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    losses = [loss_of(each(tokens()).logits) for each in (model, full)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-3)
    for (name, mine), theirs in zip(adapter_parameters(model).items(), adapter_parameters(full).values(), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max()), msg=name)
    with torch.inference_mode():
        a, b = model(tokens()).logits, full(tokens()).logits
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * float(b.abs().max()))
    with pytest.raises(UserError, match=r"is stored in .* and cannot hold the adapter's change"):
        merge_adapter(model)


def test_gradient_checkpointing_changes_nothing():
    found = []
    for again in (False, True):
        model = adapted(LoRA(rank=3, dropout=0.3)).train()
        model.gradient_checkpointing = again
        torch.manual_seed(4)
        loss_of(model(tokens()).logits).backward()
        found.append({name: parameter.grad for name, parameter in adapter_parameters(model).items()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    other = adapted(LoRA(rank=3, dropout=0.3)).train()
    torch.manual_seed(5)
    loss_of(other(tokens()).logits).backward()
    assert any(not torch.equal(parameter.grad, found[0][name]) for name, parameter in adapter_parameters(other).items())


@pytest.mark.parametrize("form", ["lora", "dora of some", "bottleneck"])
def test_a_training_pass_compiles_to_one_graph(form):
    model = adapted(FORMS[form])
    compiled = torch.compile(lambda ids: model(ids).logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), model(tokens()).logits, rtol=0, atol=1e-12)


def test_two_of_several_adapters_side_by_side_equal_each_alone():
    settings = {"a": LoRA(rank=2, alpha=3), "b": LoRA(rank=5, alpha=1, targets=("v_proj", "gate_proj", "o_proj"))}
    alone = {name: adapted(each) for name, each in settings.items()}
    factors = {
        name: {
            key: linear.adapter.fused(torch.float64)
            for key, linear in model.named_modules()
            if isinstance(linear, Linear) and linear.adapter
        }
        for name, model in alone.items()
    }
    model = base()
    shared = Adapters(settings["a"])
    put_several(model, shared, factors, torch.float64)
    model.set_adapters(shared)
    ids = tokens(4)
    step = Step.parallel(ids)
    step.adapters = torch.tensor([1, 0, 2, 1])
    with torch.no_grad():
        together = model(ids, step).logits
        expected = [alone["a"], base(), alone["b"], alone["a"]]
        for row, each in enumerate(expected):
            torch.testing.assert_close(together[row], each(ids).logits[row], rtol=0, atol=1e-10)
        assert not torch.allclose(together[0], base()(ids).logits[0], rtol=0, atol=1e-6)
        linear = model.blocks[0].mixer.qkv
        assert isinstance(linear.adapter, SeveralLoRA)
        x = torch.randn(4, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        pairs = [each.get("blocks.0.mixer.qkv") for each in factors.values()]
        shared.begin(step)
        torch.testing.assert_close(linear(x), naive_several(x, _bare(linear), pairs, [1, 0, 2, 1]), rtol=0, atol=1e-12)


def _bare(linear):
    bare = Linear(linear.in_features, linear.out_features, 0.1, linear.bias is not None).double()
    bare.weight, bare.bias = linear.weight, linear.bias
    return bare


def test_numbers_that_overflow_in_one_adapter_stay_in_its_rows():
    """A x of adapter a is infinite, and 0 times that would be no number in the rows of all others."""
    generator = torch.Generator().manual_seed(2)
    linear, shared = Linear(16, 24, 0.1), Adapters(LoRA())
    factors = [(torch.randn(3, 16, generator=generator), torch.randn(24, 3, generator=generator)) for _ in range(2)]
    both, chosen, found = SeveralLoRA(factors, linear, shared), torch.tensor([1, 2, 0]), []
    x = torch.randn(3, 5, 16, generator=generator)
    shared.names = ("a", "b")
    for broken in (False, True):
        if broken:
            both.a[:3] = 3e38
        step = Step.parallel(torch.zeros(3, 5, dtype=torch.long))
        step.adapters = chosen
        shared.begin(step)
        found.append(both(x, linear))
    assert not found[1][0].isfinite().all()
    assert torch.equal(found[1][1:], found[0][1:])
    assert not torch.equal(found[1][:1], found[0][:1]), "control"


def test_only_what_is_named_is_trained_as_it_is():
    model = base()
    attach(model, BitFit())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"blocks.{i}.mixer.qkv.bias" for i in range(2)}
    attach(model, Freeze(layers=1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("blocks.1.", "norm."))}
    attach(model, Freeze(parts=("mixer_norm", "embed")))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "embed.weight",
        "blocks.0.mixer_norm.weight",
        "blocks.1.mixer_norm.weight",
    }
    with pytest.raises(UserError, match="trains biases, but this model has none"):
        attach(base(SPEC), BitFit())
    with pytest.raises(UserError, match=r"adapter\.layers is 3 but the model has 2 layers"):
        attach(model, Freeze(layers=3))
    with pytest.raises(UserError, match=r"'mixer_nrm', but no parameter .* Did you mean 'mixer_norm'"):
        attach(model, Freeze(parts=("mixer_nrm",)))


def test_names_follow_the_weight_map():
    model = base()
    sites = find_sites(model, FAMILIES["qwen2"])
    names = [site.place.name for site in sites]
    assert len(names) == 14
    assert names[:3] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    assert [(s.place.start, s.place.rows) for s in sites[:3]] == [(0, 32), (32, 16), (48, 16)]
    assert [site.place.name for site in find_sites(model, FAMILIES["weft"])][:2] == ["blocks.0.mixer.qkv", "blocks.0.mixer.out"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), r"no linear map of that name\. Did you mean 'q_proj'\? Give some of q_proj, k_proj, v_proj, o_proj, gate_proj"),
        (("embed_tokens",), "'embed_tokens', which is not inside the layers"),
        (("input_layernorm",), "'input_layernorm', which is no linear map"),
        (("proj",), "no linear map of that name"),
    ],
)
def test_a_target_that_is_none_is_refused_by_name(targets, message):
    with pytest.raises(UserError, match=message):
        choose_places(base(), FAMILIES["qwen2"], LoRA(targets=targets))


def test_experts_and_second_adapters_are_refused():
    experts = {**SPEC, "layers": [{**SPEC["layers"][0], "channel": {"type": "experts", "experts": 4, "top_k": 2, "hidden": 16}}]}
    model = build(model_spec(experts), seed=0)
    with pytest.raises(UserError, match="which is a stack of experts; an adapter can be put on q_proj, k_proj, v_proj, o_proj"):
        choose_places(model, FAMILIES["mixtral"], LoRA(targets=("w1",)))
    assert len(choose_places(model, FAMILIES["mixtral"], LoRA())) == 8
    with pytest.raises(UserError, match=r"has an adapter \(lora\) already"):
        attach(adapted(LoRA()), LoRA())
    with pytest.raises(UserError, match="an adapter of the form bottleneck cannot be merged"):
        merge_adapter(adapted(Bottleneck()))
    with pytest.raises(UserError, match="no adapter to merge"):
        merge_adapter(base())
