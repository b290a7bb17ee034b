"""Adapters in the engine: one a row, in any company, with the cache and drafts; and virtual tokens before every prompt."""

import pytest
import torch
from engine_cases import llama_spec, random_ids

from weft.engine import Engine, Request, SamplingParams
from weft.engine.draft import NgramDrafter
from weft.engine.score import score
from weft.errors import UserError
from weft.nn import Model, build
from weft.nn.adapters import adapter_parameters, attach
from weft.nn.adapters.lora import LoRAAdapter
from weft.nn.adapters.several import put_several
from weft.nn.adapters.shared import Adapters
from weft.nn.linear import Linear
from weft.quant.model import quantize
from weft.spec import Quant
from weft.spec.adapters import LoRA, Prefix, Prompt
from weft.weights.adapter_places import choose_places
from weft.zoo import FAMILIES

FORMS = {"a": LoRA(rank=2, alpha=9), "b": LoRA(rank=5, alpha=9, targets=("v_proj", "gate_proj", "o_proj")), "c": LoRA(rank=1, alpha=4)}
CHOSEN = ["a", None, "b", "a", "c", None, "b"]
PAGE = 8


def base(dtype: torch.dtype = torch.float64) -> Model:
    return build(llama_spec(), dtype=dtype, seed=1).eval()


def with_lora(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """The base with one adapter, which is always on."""
    model = base(dtype)
    attach(model, FORMS[name], choose_places(model, FAMILIES["llama"], FORMS[name]), seed=ord(name))
    return disturbed(model, ord(name))


def disturbed(model: Model, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2
    return model.eval()


def factors_of(model: Model, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name, linear in model.named_modules():
        if isinstance(linear, Linear) and isinstance(linear.adapter, LoRAAdapter):
            found[name] = tuple(part.detach() for part in linear.adapter.fused(dtype))
    return found


def side_by_side(model: Model) -> Model:
    shared = Adapters(FORMS["a"])
    put_several(model, shared, {name: factors_of(with_lora(name), model.dtype) for name in FORMS}, model.dtype)
    model.set_adapters(shared)
    return model


def make(model: Model, **settings) -> Engine:
    return Engine(model, memory=30_000_000, page=PAGE, chunk=7, **settings)


def requests(length: int = 19, **params) -> list[Request]:
    """The same prompt under every adapter, so that the cache would mix them up if it could, then prompts of their own."""
    same = random_ids(length, 3, 97)
    given = [same] * 4 + [random_ids(5 + 4 * i, i, 97) for i in range(3)]
    settings = SamplingParams(**{"max_tokens": 9, "top_logprobs": 2, **params})
    return [Request(prompt, settings, adapter=name) for prompt, name in zip(given, CHOSEN, strict=True)]


def logprobs(results):
    return torch.tensor([[token.logprob for token in result.logprobs] for result in results], dtype=torch.float64)


def test_rows_with_different_adapters_get_what_each_model_alone_gives():
    given = make(side_by_side(base())).generate(requests())
    for result, request in zip(given, requests(), strict=True):
        alone = make(base() if request.adapter is None else with_lora(request.adapter))
        [expected] = alone.generate([Request(request.prompt, request.params)])
        assert result.ids == expected.ids
        torch.testing.assert_close(logprobs([result]), logprobs([expected]), rtol=0, atol=1e-10)
    assert len({result.ids for result in given[:4]}) == 3  # one prompt, three models, one of them twice


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_company_changes_no_bit(kind):
    model = base(torch.bfloat16) if kind == "bfloat16" else quantize(base(torch.float32), Quant(type="int8")).to(torch.bfloat16)
    model = side_by_side(model)
    together = make(model, rows=7).generate(requests())
    for result, request in zip(together, requests(), strict=True):
        [alone] = make(model, rows=1, cache=False).generate([request])
        assert result.ids == alone.ids
        assert torch.equal(logprobs([result]), logprobs([alone]))
    others = make(model, rows=7).generate([Request(r.prompt, r.params, adapter="c") for r in requests()])
    assert not torch.equal(logprobs(together), logprobs(others))


def test_the_cache_keeps_adapters_apart():
    engine = make(side_by_side(base()), rows=1)
    first = engine.generate(requests()[:4])
    assert engine.stats.cached_prompt_tokens == 16  # of the second row with adapter a; others read the same tokens under other weights
    again = engine.generate(requests()[:4])
    assert engine.stats.cached_prompt_tokens == 5 * 16
    torch.testing.assert_close(logprobs(again), logprobs(first), rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", [{"beams": 3, "n": 3, "logprobs": False, "top_logprobs": 0}, {"n": 2, "temperature": 1.0, "seed": 4}])
def test_beams_and_samples_have_their_requests_adapter(settings):
    engine = make(side_by_side(base()), rows=8)
    [request] = [r for r in requests(**settings) if r.adapter == "b"][:1]
    given = engine.generate([request])
    expected = make(with_lora("b"), rows=8).generate([Request(request.prompt, request.params)])
    assert [result.ids for result in given] == [result.ids for result in expected]
    assert [r.ids for r in engine.generate([Request(request.prompt, request.params)])] != [r.ids for r in given]


def test_drafts_are_verified_under_the_rows_adapter():
    prompts = [Request([5, 6, 7, 8] * 6, SamplingParams(max_tokens=20), adapter=name) for name in CHOSEN]
    plain = make(side_by_side(base())).generate(prompts)
    engine = make(side_by_side(base()), draft=NgramDrafter())
    assert [result.ids for result in engine.generate(prompts)] == [result.ids for result in plain]
    assert engine.stats.drafted_tokens > 0


def test_an_adapter_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"asks for the adapter 'd', but the model has a, b, c"):
        make(side_by_side(base())).submit(Request([1], adapter="d"))
    with pytest.raises(UserError, match="the model has none to choose among"):
        make(with_lora("a")).submit(Request([1], adapter="a"))


@pytest.mark.parametrize("settings", [Prompt(tokens=5), Prefix(tokens=5)], ids=["prompt", "prefix"])
@pytest.mark.parametrize("window", [None, 6], ids=["all", "window"])
def test_virtual_tokens_stand_before_every_prompt(settings, window):
    spec = llama_spec().model_dump()
    spec["layers"][0]["mixer"]["window"] = window
    model = disturbed(attach(build(type(llama_spec()).model_validate(spec), dtype=torch.float64, seed=1), settings, seed=2), 7)
    params = SamplingParams(max_tokens=12, top_logprobs=1, repetition_penalty=1.3)
    prompts = [random_ids(3 + 6 * i, i, 97) for i in range(4)]
    engine = make(model)
    results = engine.generate([Request(prompt, params) for prompt in prompts])
    before = torch.tensor(model.virtual_ids)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.prompt_tokens == len(prompt)
        whole = torch.cat([before, torch.tensor([*prompt, *result.ids])])
        with torch.no_grad():
            logits = model(whole[None]).logits[0, len(before) + len(prompt) - 1 : -1]
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(result.ids)[:, None])[:, 0]
        torch.testing.assert_close(logprobs([result])[0], picked, rtol=0, atol=1e-10)
        scored = score(model, [[*prompt, *result.ids]], chunk=7)[0].logprobs[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(scored, dtype=torch.float64), picked, rtol=0, atol=1e-10)
        with torch.no_grad():
            bare = model(whole[None, len(before) :]).logits[0, len(prompt) - 1 : -1]
        if window is None or len(prompt) < window:  # else they are out of sight
            assert not torch.allclose(bare, logits, rtol=0, atol=1e-3)
    assert engine.context == model.spec.context - 5
    with pytest.raises(UserError, match="the model's context is 123"):
        engine.submit(Request([1] * 124))


def test_virtual_tokens_survive_preemption_and_the_cache():
    model = disturbed(attach(base(), Prefix(tokens=5), seed=2), 7)
    prompts = [Request(random_ids(20, i % 2, 97), SamplingParams(max_tokens=30, top_logprobs=1)) for i in range(5)]
    roomy = make(model, cache=False).generate(prompts)
    tight = Engine(model, memory=60_000, page=PAGE, chunk=7)
    given = tight.generate(prompts)
    assert [result.ids for result in given] == [result.ids for result in roomy]
    assert tight.stats.preemptions + tight.stats.cached_prompt_tokens > 0
