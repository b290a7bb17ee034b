"""Latent attention: the absorbed and the expanded form against the definition, the module against the paper, and when each form runs."""

import math

import pytest
import torch
from in_passes import in_passes

from weft.engine import Engine, Request, SamplingParams
from weft.errors import UserError
from weft.nn import Arena, Runner, attend_latent, build, latent_attention
from weft.nn.attend_latent import MANY, attend_absorbed, attend_expanded, attend_latent_naive, expanding_pays_from
from weft.nn.packed import PackedWeight
from weft.quant.model import quantize
from weft.spec import Attention, LatentAttention, Quant, model_spec

SHAPES = [
    (1, 1, 1, 1, 3, 2, 2, 2),
    (2, 5, 7, 4, 9, 3, 4, 5),
    (3, 1, 13, 3, 6, 5, 2, 3),
    (2, 11, 11, 2, 7, 8, 6, 1),
]  # B, T, K, H, R, N, P, V
YARN = {"type": "yarn", "factor": 4.0, "original_context": 16, "attention_factor": 1.0, "mscale_all_dim": 0.7}
MIXER = {"type": "latent_attention", "heads": 4, "kv_rank": 9, "q_rank": 7, "nope_head_dim": 5, "rope_head_dim": 4, "v_head_dim": 3}


def model_of(dtype=torch.float64, layers=2, **changes):
    layer = {"repeat": layers, "mixer": {**MIXER, **changes}, "channel": {"type": "gated", "hidden": 48}}
    return build(model_spec({"vocab": 40, "dim": 32, "context": 256, "init_std": 0.3, "layers": [layer]}), dtype=dtype, seed=1).eval()


def random_tokens(length, batch=2):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(length))


def inputs(shape, dtype=torch.float64):
    batch, length, keys, heads, rank, nope, rotated, value = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((batch, length, heads, nope), (batch, length, heads, rotated), (batch, keys, rank), (batch, keys, rotated))
    parts = [torch.randn(*size, generator=generator, dtype=dtype) for size in (*sizes, (heads * (nope + value), rank))]
    mask = torch.arange(keys) <= torch.arange(keys - length, keys)[:, None]
    return parts, mask.expand(batch, -1, -1)


def results(attend, parts, mask, scale=0.4):
    leaves = [part.clone().requires_grad_() for part in parts]
    out = attend(*leaves, mask, scale)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("attend", [attend_absorbed, attend_expanded])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_equal_the_definition(shape, attend):
    parts, mask = inputs(shape)
    want = results(attend_latent_naive, parts, mask)
    for a, b in zip(results(attend, parts, mask), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    if shape[2] > 1:
        wrong = results(attend, [*parts[:3], parts[3].roll(1, 1), parts[4]], mask)
        assert all((a - b).abs().max() > 1e-6 for a, b in zip(wrong, want, strict=True)), "control: keys of other positions show everywhere"


@pytest.mark.parametrize("attend", [attend_absorbed, attend_expanded, attend_latent_naive])
def test_a_query_without_keys_gives_zeros(attend):
    parts, mask = inputs(SHAPES[1])
    mask = mask.clone()
    mask[0, 2] = False
    out = attend(*parts, mask, 0.4)
    assert torch.isfinite(out).all()
    assert (out[0, 2] == 0).all()
    assert (out[1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_do_not_depend_on_each_other_bit_for_bit(dtype):
    parts, mask = inputs((5, 3, 65, 6, 64, 32, 16, 24), dtype)
    parts[4] /= 8
    together = attend_absorbed(*parts, mask, 0.25)
    for row in range(5):
        alone = attend_absorbed(*(part[row : row + 1] for part in parts[:4]), parts[4], mask[row : row + 1], 0.25)
        assert torch.equal(together[row : row + 1], alone)
        single = attend_absorbed(
            *(part[row : row + 1, 1:2] for part in parts[:2]),
            *(part[row : row + 1] for part in parts[2:4]),
            parts[4],
            mask[row : row + 1, 1:2],
            0.25,
        )
        if dtype != torch.float32:
            assert torch.equal(together[row : row + 1, 1:2], single), "nor on the other tokens of a pass"
    apart = (attend_expanded(*parts, mask, 0.25) - together).abs().max()
    assert 0 < apart < 0.05 * together.abs().max(), "control: the other form has other bits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_with_keys_have_the_same_bits_either_way_round(dtype):
    generator = torch.Generator().manual_seed(4)
    for batch, queries, keys, width in ((1, MANY, 65, 80), (2, 700, 257, 144), (1, MANY + 1, 127, 40)):
        q, k = (torch.randn(batch, size, width, generator=generator).to(dtype) for size in (queries, keys))
        usual = attend_latent._products(q, k)
        few = attend_latent._products(q[:, : MANY - 1], k)
        assert torch.equal(few, usual[:, : MANY - 1])
        assert torch.equal(attend_latent._products(q[:1, 3:20], k[:1]), usual[:1, 3:20])
        assert not torch.equal((q.float() @ k.float().transpose(1, 2) * (1 + 2**-8)).to(dtype), usual), "control: one bit shows"


def by_the_paper(mixer, x, base=10000.0):
    """Equations 9 to 19 of DeepSeek-V2 for x [T, D], head by head and token by token, with rotations as complex products."""
    spec, length = mixer.spec, x.shape[0]
    rows = mixer.down.weight.split(list(spec.down_rows()))
    nope, rotated = spec.nope_head_dim, spec.rope_head_dim
    angles = torch.arange(length)[:, None] * (
        1.0 / base ** (torch.arange(0, rotated, 2) / rotated)
    )  # in float32, as published models have them

    def normed(norm, y):
        return y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    def turned(y):
        z = torch.complex(*y.chunk(2, -1)) * torch.complex(angles.cos(), angles.sin())
        return torch.cat([z.real, z.imag], -1)

    queries = x @ rows[0].T
    if spec.q_rank:
        queries = normed(mixer.q_norm, queries) @ mixer.q_up.weight.T
    latent, shared = normed(mixer.kv_norm, x @ rows[1].T), turned(x @ rows[2].T)
    heads = []
    for query, up in zip(queries.chunk(spec.heads, -1), mixer.kv_up.chunk(spec.heads), strict=True):
        query = torch.cat([query[:, :nope], turned(query[:, nope:])], -1)
        key, value = torch.cat([latent @ up[:nope].T, shared], -1), latent @ up[nope:].T
        factor = (0.1 * 0.7 * math.log(4.0) + 1) ** 2 if spec.rope.scaling else 1.0
        mixed = []
        for t in range(length):
            scores = key[: t + 1] @ query[t] * factor / math.sqrt(nope + rotated)
            mixed.append(scores.softmax(0) @ value[: t + 1])
        heads.append(torch.stack(mixed))
    return torch.cat(heads, -1) @ mixer.out.weight.T


@pytest.mark.parametrize("changes", [{}, {"q_rank": None}, {"v_head_dim": None, "heads": 3}, {"rope": {"base": 100.0}}], ids=str)
def test_the_module_computes_the_papers_equations(changes):
    from weft.nn import Step

    mixer, x = model_of(**changes).blocks[0].mixer, torch.randn(2, 19, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for norm in (mixer.q_norm, mixer.kv_norm):
            if norm is not None:
                norm.weight.uniform_(0.5, 2.0)
        got = mixer(x, Step.parallel(torch.zeros(2, 19, dtype=torch.long)))[0]
        want = torch.stack([by_the_paper(mixer, row, mixer.spec.rope.base) for row in x])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        assert (by_the_paper(mixer, x[0], 50.0) - want[0]).abs().max() > 1e-3, "control: another rotation shows"


def test_yarn_sharpens_scores_in_every_kind_of_attention():
    """mscale_all_dim multiplies scores by (0.1 mscale_all_dim ln factor + 1)^2, whatever the rotation itself does."""
    factor = (0.1 * 0.7 * math.log(4.0) + 1) ** 2
    latent = LatentAttention(**{**MIXER, "rope": {"scaling": YARN}})
    assert latent.scale == pytest.approx(factor / 3.0, rel=1e-12)
    assert LatentAttention(**{**MIXER, "rope": {"scaling": {**YARN, "factor": 1.0}}}).scale == pytest.approx(1 / 3.0, rel=1e-12)
    tokens = random_tokens(17)
    plain = {"type": "attention", "heads": 4, "rope": {"scaling": {**YARN, "mscale_all_dim": None}}}
    outputs = []
    for mixer in ({**plain, "rope": {"scaling": YARN}}, {**plain, "scale": factor * 8**-0.5}, plain):
        spec = model_spec({"vocab": 40, "dim": 32, "init_std": 0.3, "layers": [{"mixer": mixer}]})
        outputs.append(build(spec, dtype=torch.float64, seed=1)(tokens).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-4, "control: without the factor scores are flatter"


@pytest.mark.parametrize("page", [None, 4])
def test_over_state_latents_are_absorbed_unless_the_user_lets_long_passes_expand(monkeypatch, page):
    model, tokens = model_of(), random_tokens(61)
    assert model.blocks[0].mixer.pays_from == 8
    taken = []
    for form in (attend_absorbed, attend_expanded):
        monkeypatch.setattr(latent_attention, form.__name__, lambda *given, form=form: (taken.append(form), form(*given))[1])
    want = model(tokens).logits
    sizes = [7, 1, 40, 3, 10]
    for coarse, forms in ((False, {attend_absorbed}), (True, {attend_absorbed, attend_expanded})):
        taken.clear()
        got, _ = in_passes(model, tokens, sizes, page=page, coarse=coarse)
        assert (got - want).abs().max() < 1e-10
        assert set(taken) == forms
        assert taken.count(attend_expanded) == (4 if coarse else 0)  # two layers, passes of 40 and 10 tokens


def test_fast_reaches_the_module_through_a_runner(monkeypatch):
    model = model_of()
    monkeypatch.setattr(latent_attention, "attend_expanded", lambda *given: (calls.append(1), attend_expanded(*given))[1])
    for fast in (False, True):
        model.fast, calls = fast, []
        with torch.no_grad():
            Runner(model, Arena(model, 2, 64, 64))(random_tokens(40), torch.tensor([40, 33]))
        assert len(calls) == (2 if fast else 0)


def test_where_expanding_begins_to_pay_counts_operations():
    rank, nope, value, rotated, keys = 512, 128, 128, 64, 1000
    for queries in (1, 100, 170, 171, 172, 1000):
        absorbed = queries * keys * (2 * rank + rotated)
        expanded = keys * rank * (nope + value) + queries * keys * (nope + rotated + value)
        assert (expanded < absorbed) == (queries >= expanding_pays_from(rank, nope, value))
    assert expanding_pays_from(8, 8, 8) is None, "values and keys as wide as the latent are never cheaper to write out"


def test_state_is_the_latent_and_one_rotated_key():
    spec = model_spec({"vocab": 8, "dim": 32, "layers": [{"repeat": 3, "mixer": MIXER}]})
    assert spec.state_bytes(100) == 3 * 100 * (9 + 4) * 2
    heads = Attention(heads=4, head_dim=5)
    assert spec.state_bytes(100) < 3 * sum(leaf.num_bytes(100, 2) for leaf in heads.state(32).values())
    model = build(spec, seed=0).eval()
    sizes = [Arena(model, 2, length, 4).bytes() for length in (50, 51)]
    assert sizes[1] - sizes[0] == 2 * 3 * (9 + 4) * 4


def test_training_in_mixed_precision_traces_into_one_graph_and_follows_float32():
    from weft.nn import Step

    model, tokens = model_of(torch.float32).train(), random_tokens(33)
    index = torch.arange(33).expand(2, -1)
    gradients = []
    for mixed in (False, True):
        model.zero_grad()
        run = torch.compile(model, fullgraph=True, backend="eager") if mixed else model
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = run(tokens, Step.packed(index % 20, index // 20)).logits
        logits.float().log_softmax(-1).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-6 < error < 0.05


def test_dropout_falls_on_weights_in_training_alone():
    spec = {"vocab": 40, "dim": 32, "layers": [{"mixer": MIXER}], "dropout": {"attention": 0.4}, "init_std": 0.3}
    model, tokens = build(model_spec(spec), dtype=torch.float64, seed=1), random_tokens(12)
    assert torch.equal(model.eval()(tokens).logits, model(tokens).logits)
    torch.manual_seed(0)
    assert (model.train()(tokens).logits - model(tokens).logits).abs().max() > 1e-3


def test_a_quantised_model_packs_all_but_what_is_absorbed():
    spec = {
        "vocab": 40,
        "dim": 32,
        "init_std": 0.3,
        "layers": [{"repeat": 2, "mixer": {**MIXER, "kv_rank": 32, "q_rank": 32, "v_head_dim": 8}}],
    }
    model, tokens = build(model_spec(spec), seed=1).eval(), random_tokens(40)
    packed = quantize(model, Quant(type="int8"))
    kept = {name for name, part in packed.blocks[0].mixer.named_modules() if isinstance(part, PackedWeight)}
    assert kept == {"down.weight", "q_up.weight", "out.weight"}
    assert torch.equal(packed.blocks[0].mixer.kv_up, model.blocks[0].mixer.kv_up)
    with torch.no_grad():
        whole, exact = packed(tokens).logits, model(tokens).logits
    assert 1e-4 < (whole - exact).abs().max() / exact.abs().max() < 0.05
    assert (in_passes(packed, tokens, [7, 1, 32], torch.float32)[0] - whole).abs().max() < 1e-3 * whole.abs().max()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_answers_in_company_as_alone(kind):
    mixer = {**MIXER, "kv_rank": 32, "q_rank": 32, "nope_head_dim": 12, "v_head_dim": 8}
    layers = [{"repeat": 2, "mixer": mixer, "channel": {"type": "gated", "hidden": 64}}]
    spec = model_spec({"vocab": 40, "dim": 64, "context": 128, "init_std": 0.2, "norm": {"type": "rms"}, "layers": layers})
    model = quantize(build(spec, seed=0).eval(), Quant(type=kind))
    params = SamplingParams(max_tokens=9, logprobs=True)
    requests = [Request(random_tokens(length, 1)[0].tolist(), params) for length in (5, 1, 15, 29, 2)]
    together = Engine(model, rows=3, chunk=7).generate(requests)
    alone = [result for request in requests for result in Engine(model, rows=3, chunk=7).generate([request])]
    assert [result.ids for result in together] == [result.ids for result in alone]
    assert [result.logprobs for result in together] == [result.logprobs for result in alone], "to the bit"
    assert len({tuple(result.ids) for result in together}) > 1


def test_an_odd_rotation_is_a_sentence():
    with pytest.raises(UserError, match=r"rope_head_dim is 3; channels are rotated in pairs: give an even number\."):
        model_of(rope_head_dim=3)
