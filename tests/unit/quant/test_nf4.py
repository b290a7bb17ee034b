"""NF4 with double quantisation: bitsandbytes' codes, scales and values; and gradients that pass through packed weights of every form."""

import pytest
import torch

from weft.errors import UserError
from weft.nn import build
from weft.nn.linear import packed_weight
from weft.nn.packed import NF4, PackedWeight
from weft.nn.packed_nf4 import DoubleNF4Weight, dynamic_levels
from weft.objectives.head import head_of
from weft.quant import quantize
from weft.quant.load import load_quantised
from weft.quant.rounding import round_to_nearest
from weft.spec import Quant, model_spec
from weft.weights.load import load_model, load_weights, open_checkpoint
from weft.weights.save import save_model
from weft.zoo import ENTRIES

DOUBLE = Quant(type="nf4", double=True)
FORMS = [Quant(type="int8"), Quant(type="int4"), Quant(type="int4", minimum=True), Quant(type="nf4"), DOUBLE]
IDS = ["int8", "int4", "int4-minimum", "nf4", "nf4-double"]
SPEC = {
    "vocab": 50,
    "dim": 64,
    "context": 128,
    "init_std": 0.15,
    "norm": {"type": "rms"},
    "layers": [
        {
            "repeat": 2,
            "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}},
            "channel": {"type": "gated", "hidden": 128},
        }
    ],
}


def random_weight(rows=50, columns=192, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 2, rows)[:, None]


def packed(quant, weight=None):
    weight = random_weight() if weight is None else weight
    return packed_weight(*weight.shape, quant).fill(*round_to_nearest(weight, quant))


@pytest.mark.parametrize("columns", [64, 192, 1024])
def test_codes_scales_and_values_are_those_of_bitsandbytes(columns):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == torch.tensor(NF4).tolist()
    assert torch.equal(dynamic_levels(), functional.create_dynamic_map(signed=True))
    weight = random_weight(37, columns, seed=columns)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes = round_to_nearest(weight, DOUBLE)
    assert torch.equal(codes.scale.flatten(), state.absmax.flatten())
    own = packed(DOUBLE, weight)
    assert torch.equal(own.codes.flatten(), theirs.flatten())
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(own.codes.flatten(), theirs.flatten())
    assert torch.equal(own.scale_max, state.state2.absmax.flatten())
    assert own.scale_mean.item() == state.offset.item()
    # bitsandbytes looks codes of scales up in a table that decides near a midpoint of two levels by chance; elsewhere they are equal.
    levels, place = dynamic_levels(), torch.arange(codes.scale.numel()) // 256
    share = (codes.scale.flatten() - own.scale_mean) / own.scale_max[place]
    midway = ((levels[1:] + levels[:-1]) / 2 - share[:, None]).abs().amin(1) < 2e-5
    same = own.scale.flatten() == state.absmax.flatten()
    assert (same | midway).all()
    assert same.float().mean() > 0.99
    want = functional.dequantize_4bit(theirs, state).view(weight.shape)
    torch.testing.assert_close(own.dequantise().view(-1, 64)[same], want.view(-1, 64)[same], rtol=0, atol=1e-6)
    once = packed(Quant(type="nf4"), weight).dequantise()
    assert (once - want).abs().max() > 1e-3, "control: groups of 32 with scales of their own are another matrix"


def test_scales_that_are_rounded_cost_little():
    weight = random_weight(64, 512)
    exact = round_to_nearest(weight, DOUBLE)
    stored = packed(DOUBLE, weight).unpack()[1]
    assert 0 < ((stored - exact.scale) / exact.scale).abs().mean() < 0.02
    errors = {quant.double: (packed(quant, weight).dequantise() - weight).square().mean() for quant in (Quant(type="nf4"), DOUBLE)}
    assert errors[False] < errors[True] < 1.5 * errors[False]


@pytest.mark.parametrize("rows", [1, 16, 50])
def test_rows_parts_and_the_whole_are_one_matrix(rows):
    own = packed(DOUBLE, random_weight(rows))
    codes, scale, _ = own.unpack()
    levels = torch.tensor(NF4, dtype=torch.float64)[codes.int()]
    want = levels * scale.double().repeat_interleave(64, 1)
    torch.testing.assert_close(own.dequantise(torch.float64), want, rtol=1e-6, atol=0)
    ids = torch.tensor([[0, rows - 1]])
    assert torch.equal(own.rows(ids)[0], own.dequantise()[ids[0]])
    x = torch.randn(3, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(own.multiply(x), x @ want.T, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(own.part(0, rows, x), own.multiply(x), rtol=0, atol=0)


@pytest.mark.parametrize("quant", FORMS, ids=IDS)
def test_what_is_written_out_in_stretches_is_what_is_written_out_at_once(quant, monkeypatch):
    own = packed(quant)
    whole = own.dequantise()
    monkeypatch.setattr("weft.nn.packed.AT_ONCE", 192 * 16)
    assert torch.equal(own.dequantise(), whole)
    assert torch.equal(own.dequantise(torch.bfloat16), whole.bfloat16())
    monkeypatch.setattr("weft.quant.rounding.AT_ONCE", 192 * 7)
    assert torch.equal(packed(quant).dequantise(), whole)


@pytest.mark.parametrize("quant", FORMS, ids=IDS)
def test_gradients_pass_through_and_nothing_else_is_kept(quant):
    own = packed(quant)
    x = torch.randn(2, 5, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept: list[torch.Tensor] = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = own.multiply(mine * 1.0)
    stored = {buffer.data_ptr() for buffer in own.stored().values()}
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 10} <= stored
    want = plain @ own.dequantise(torch.float64).T
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    outer = torch.randn_like(y)
    (y * outer).sum().backward()
    (want * outer).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=1e-10)
    assert plain.grad.abs().max() > 1, "control: there is a gradient"


@pytest.mark.parametrize("quant", [Quant(type="int8"), Quant(type="int4", minimum=True), DOUBLE], ids=lambda q: q.type)
def test_a_compiled_product_is_the_same_product(quant):
    own = packed(quant)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(4))

    def loss(x):
        return own.multiply(x).square().sum()

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("quant", FORMS, ids=IDS)
def test_a_model_is_read_in_fewer_bits_as_it_would_be_rounded_whole(tmp_path, quant):
    save_model(build(model_spec(SPEC), seed=4), tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    read, made = load_quantised(checkpoint, quant), quantize(load_weights(checkpoint), quant)
    assert read.spec == made.spec
    for (name, one), (other_name, other) in zip(read.state_dict().items(), made.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name
    assert sum(isinstance(module, PackedWeight) for module in read.modules()) == 9
    narrow = load_quantised(checkpoint, quant, dtype=torch.bfloat16)
    for one, other in zip(narrow.modules(), read.modules(), strict=True):
        assert not isinstance(one, PackedWeight) or torch.equal(one.dequantise(), other.dequantise())
    assert narrow.norm.weight.dtype == torch.bfloat16
    save_model(read, tmp_path / "packed")
    loaded = load_model(tmp_path / "packed")
    assert loaded.spec.quant == quant
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, made(tokens).logits)
    with pytest.raises(UserError, match=f"is quantised to {quant.type} already"):
        load_quantised(open_checkpoint(tmp_path / "packed"), quant)


def test_a_model_whose_rows_do_not_divide_is_refused(tmp_path):
    narrow = {"dim": 32, "layers": [{**SPEC["layers"][0], "channel": {"type": "gated", "hidden": 96}}]}
    save_model(build(model_spec({**SPEC, **narrow}), seed=4), tmp_path / "model")
    with pytest.raises(UserError, match=r"no matrix inside the layers of .* has rows of a multiple of 64 weights"):
        load_quantised(open_checkpoint(tmp_path / "model"), DOUBLE)
    assert load_quantised(open_checkpoint(tmp_path / "model"), Quant(type="nf4")).spec.quant is not None


def test_gradients_of_a_quantised_model_are_those_of_the_same_matrices_in_float():
    made = quantize(build(model_spec(SPEC), seed=4), DOUBLE).to(torch.float64)
    tokens = torch.arange(40).view(2, 20)

    def gradient():
        made.zero_grad()
        weight = head_of(made).weight
        (made(tokens).hidden @ weight.T).square().sum().backward()
        return made.norm.weight.grad.clone(), made.blocks[0].mixer_norm.weight.grad.clone()

    packed_gradients = gradient()
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedWeight):
                delattr(module, name)
                module.weight = torch.nn.Parameter(child.dequantise(torch.float64), requires_grad=False)
    for one, other in zip(packed_gradients, gradient(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert other.abs().max() > 1e-3


def test_qloras_base_takes_less_than_half_of_bfloat16():
    spec = ENTRIES["smollm2-135m"].spec
    plain = 2 * sum(parameter.numel() for parameter in build(spec, "meta").parameters())
    made = build(model_spec({**spec.model_dump(), "quant": DOUBLE}), "meta", torch.float32)
    own = sum(module.num_bytes for module in made.modules() if isinstance(module, PackedWeight))
    own += sum(parameter.numel() * 4 for parameter in made.parameters())
    assert own < 0.33 * plain, f"{own / plain:.1%}"
    layers = [m for m in made.modules() if isinstance(m, DoubleNF4Weight)]
    bits = 8 * sum(m.num_bytes for m in layers) / sum(m.numel() for m in layers)
    assert bits == pytest.approx(DOUBLE.bits(), abs=1e-3)


@pytest.mark.parametrize(
    ("given", "words"), [({"type": "int8", "double": True}, "only nf4"), ({"type": "nf4", "minimum": True}, "only int4")]
)
def test_forms_that_a_type_does_not_have_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        model_spec({**SPEC, "quant": given})
