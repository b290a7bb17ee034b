"""What a request gets does not depend on what runs beside it."""

import pytest
import torch
from engine_cases import SPECS, alone, drift, llama, model_of, prompts, random_ids, requests_for, same_ids, together

from weft.engine import Engine, Request, SamplingParams
from weft.nn import Arena, Runner, build
from weft.nn import linear as linear_module
from weft.spec import model_spec

GAP = 1e-4
TOLERANCE = 1e-10


@pytest.mark.parametrize("name", SPECS)
def test_float64_batch_equals_each_alone(name):
    model, requests = model_of(name), requests_for(name)
    batch = together(model, requests)
    assert drift(batch, alone(model, requests)) < TOLERANCE
    assert [len(result.ids) for result in batch] == [request.params.max_tokens for request in requests]


@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("pre", "post", "sandwich", "parallel", "learned", "softcap")])
def test_bfloat16_batch_equals_each_alone(name):
    model, requests = model_of(name, torch.bfloat16), requests_for(name, torch.bfloat16)
    assert drift(together(model, requests), alone(model, requests)) == 0


@pytest.mark.parametrize("name", ["gqa", "window", "lstm", "gru", "mamba", "rwkv_channel_mix", "hybrid", "everything"])
def test_float32_batch_equals_each_alone_but_for_near_ties(name):
    requests = [r for r in requests_for(name, torch.float32, top_logprobs=2) if r.params.greedy]
    model = model_of(name, torch.float32)
    for ours, solo in zip(together(model, requests), alone(model, requests), strict=True):
        differing = [place for place, pair in enumerate(zip(ours.ids, solo.ids, strict=True)) if pair[0] != pair[1]]
        if differing:
            (_, first), (_, second) = solo.logprobs[differing[0]].top
            assert first - second < GAP


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_number_of_rows_gives_the_same(rows, dtype):
    model, requests = model_of("hybrid", dtype), requests_for("hybrid")
    assert drift(together(model, requests, rows), together(model, requests, 3)) < (TOLERANCE if dtype == torch.float64 else 1e-300)


def test_chunk_size_does_not_matter_in_float64():
    model, requests = model_of("hybrid"), requests_for("hybrid")
    assert drift(Engine(model, chunk=5).generate(requests), Engine(model, chunk=64).generate(requests)) < TOLERANCE


def test_samples_depend_on_the_seed_and_not_on_company_or_order():
    model = llama()
    sampled = [Request(p, SamplingParams(max_tokens=12, temperature=1.0, seed=n)) for n, p in enumerate(prompts(97))]
    forwards = together(model, sampled)
    backwards = together(model, sampled[::-1])[::-1]
    assert same_ids(forwards, backwards)
    other = [Request(r.prompt, SamplingParams(max_tokens=12, temperature=1.0, seed=n + 50)) for n, r in enumerate(sampled)]
    assert all(ours.ids != theirs.ids for ours, theirs in zip(forwards, together(model, other), strict=True)), "control: the seed matters"


def test_several_samples_of_a_request_equal_those_in_other_company():
    model = llama()
    request = Request(random_ids(9, vocab=97), SamplingParams(max_tokens=10, temperature=1.0, seed=5, n=5))
    company = [Request(p, SamplingParams(max_tokens=6)) for p in prompts(97)]
    solo = Engine(model, rows=8, chunk=7).generate([request])
    crowded = [r for r in Engine(model, rows=2, chunk=7).generate([*company, request]) if r.request == len(company)]
    assert same_ids(solo, crowded)
    assert len({result.ids for result in solo}) == 5, "control: the samples differ from one another"
    first = Engine(model).generate([Request(request.prompt, SamplingParams(max_tokens=10, temperature=1.0, seed=5))])
    assert first[0].ids == solo[0].ids


# controls: the tests above would notice


@pytest.mark.parametrize("name", ["gqa", "lstm", "mamba", "hybrid"])
def test_a_row_that_is_not_reset_is_noticed(name, monkeypatch):
    model, requests = model_of(name), requests_for(name)
    right = alone(model, requests)

    attach = Arena.attach

    def keep_some(arena, row, pages, length, copy=None):
        attach(arena, row, pages, length, copy)
        arena.lens[row] = 4

    monkeypatch.setattr(Arena, "attach", keep_some)
    assert drift(together(model, requests), right) > 1000 * TOLERANCE


@pytest.mark.parametrize("name", ["gqa", "learned", "mamba"])
def test_left_padding_is_noticed(name):
    """As other engines batch: prompts moved to the right edge, their padding fed as if it were text."""
    model = model_of(name)
    texts = prompts()[:4]
    longest = max(map(len, texts))
    padded = [[0] * (longest - len(text)) + text for text in texts]
    params = SamplingParams(max_tokens=10, logprobs=True)
    requests, wrong = ([Request(text, params) for text in given] for given in (texts, padded))
    assert drift(together(model, wrong), alone(model, requests)) > 1000 * TOLERANCE


# the numbers below the tokens: bits of the logits


def logits_of(model, texts, rows, padded_to, capacity):
    """Logits after each text and after four more tokens, with idle rows, padding and room as given."""
    arena = Arena(model, rows, capacity, 32)
    runner = Runner(model, arena)
    index = torch.arange(len(texts))
    tokens = torch.zeros(len(texts), padded_to, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    found = [runner(tokens, torch.tensor([len(text) for text in texts]), index)]
    for step in range(4):
        single, counts = torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        single[: len(texts)], counts[: len(texts)] = 3 + step, 1
        found.append(runner(single, counts)[: len(texts)])
    return torch.stack(found, 1)


def wide_model(dtype):
    """Products long enough for the kernels that divide them: 4096 channels into a few."""
    spec = {
        "vocab": 64,
        "dim": 96,
        "context": 512,
        "layers": [{"mixer": {"type": "attention", "heads": 3, "out_bias": True}, "channel": {"type": "mlp", "hidden": 4096}}],
    }
    return build(model_spec(spec), dtype=dtype, seed=0).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gqa", "window", "lstm", "gru", "mamba", "mamba_short", "hybrid", "sinusoidal", "wide"])
def test_16_bit_logits_have_the_same_bits_in_any_company(name, dtype):
    model = wide_model(dtype) if name == "wide" else model_of(name, dtype)
    texts = [random_ids(length, length) for length in (13, 1, 2, 7, 20, 5, 3, 16, 9)]
    with torch.inference_mode():
        solo = [logits_of(model, [text], 1, len(text), 127) for text in texts]
        for count, rows, padded_to, capacity in ((2, 2, 13, 127), (5, 5, 20, 255), (9, 12, 32, 383)):
            batch = logits_of(model, texts[:count], rows, padded_to, capacity)
            assert all(torch.equal(batch[row], solo[row][0]) for row in range(count))


def in_float32(x, weight, bias=None):
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def test_another_kernel_for_the_same_weight_would_be_noticed(monkeypatch):
    model = wide_model(torch.bfloat16)
    text = random_ids(13)
    with torch.inference_mode():
        right = logits_of(model, [text], 1, 13, 127)
        monkeypatch.setattr(linear_module, "affine", in_float32)
        assert not torch.equal(logits_of(model, [text], 1, 13, 127), right)
