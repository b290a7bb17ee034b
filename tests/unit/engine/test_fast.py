"""Coarse products for prompts: what `Model.fast` may change is small and declared, and without it nothing changes."""

from collections.abc import Sequence

import pytest
import torch
from engine_cases import random_ids

from weft import kernels
from weft.engine import Engine, Request, SamplingParams, score
from weft.engine.open import open_engine
from weft.errors import UserError
from weft.nn import Model, build
from weft.nn.packed import PackedWeight
from weft.quant import quantize
from weft.spec import Quant, model_spec

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler, or WEFT_KERNELS=off")

FURTHEST = 0.5  # nats below the likeliest token; docs/bench.md declares the same
NEW = 12
LAYER = {
    "repeat": 2,
    "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}},
    "channel": {"type": "gated", "hidden": 96},
}
TEXTS = (
    "Once upon a time, there was a little girl named Lily. She lived in a small house near the river with her mother, her father and "
    "an old grey cat that slept all day.",
    "She opened the letter, and read it twice. " * 12,
    "def merge(left, right):\n    result = []\n    while left and right:\n        source = left if left[0] <= right[0] else right\n"
    "        result.append(source.pop(0))\n    return result + left + right\n\n\ndef sort(values):\n    if len(values) < 2:\n",
    "The river rose for three days, and on the fourth it stood at the doors of the mill. Nobody in the village had seen it so high. "
    "The miller carried his books to the loft, then the flour, and last of all",
)


def written(model: Model, prompts: Sequence[Sequence[int]], fast: bool, new: int = NEW) -> list[list[int]]:
    """Prompts with their greedy continuations, each in an engine of its own; the model is exact afterwards."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    model.fast = fast
    try:
        results = [Engine(model, rows=1).generate([Request(list(prompt), params)])[0] for prompt in prompts]
    finally:
        model.fast = False
    return [[*prompt, *result.ids] for prompt, result in zip(prompts, results, strict=True)]


def furthest(model: Model, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> float:
    """How far below the likeliest token a written one is at most, in nats, computed exactly."""
    scores = score(model, texts)
    return max(max(found.margins[len(prompt) - 1 :]) for prompt, found in zip(prompts, scores, strict=True))


@pytest.fixture(scope="module", params=["int8", "int4"])
def tiny(request: pytest.FixtureRequest) -> Model:
    spec = {"vocab": 97, "dim": 64, "context": 160, "init_std": 0.15, "norm": {"type": "rms"}, "layers": [LAYER]}
    return quantize(build(model_spec(spec), seed=2).eval(), Quant(type=request.param, minimum=request.param == "int4"))


def first_logprob(model: Model, prompt: Sequence[int], fast: bool) -> float:
    model.fast = fast
    try:
        params = SamplingParams(max_tokens=1, logprobs=True)
        return Engine(model, rows=1).generate([Request(list(prompt), params)])[0].logprobs[0].logprob
    finally:
        model.fast = False


def test_only_passes_of_32_tokens_and_more_are_coarse(tiny: Model) -> None:
    short, long = random_ids(31, 1, 97), random_ids(97, 2, 97)
    assert first_logprob(tiny, short, fast=True) == first_logprob(tiny, short, fast=False)
    assert first_logprob(tiny, long, fast=True) != first_logprob(tiny, long, fast=False)
    assert first_logprob(tiny, long, fast=True) == pytest.approx(first_logprob(tiny, long, fast=False), abs=0.1)


def test_a_float_model_has_nothing_coarse() -> None:
    model = build(model_spec({"vocab": 97, "dim": 32, "context": 160, "norm": {"type": "rms"}, "layers": [LAYER]}), seed=2).eval()
    long = random_ids(97, 2, 97)
    assert first_logprob(model, long, fast=True) == first_logprob(model, long, fast=False)


def test_without_fast_every_token_is_the_likeliest(tiny: Model) -> None:
    prompts = [random_ids(length, length, 97) for length in (33, 97, 5)]
    assert furthest(tiny, prompts, written(tiny, prompts, fast=False)) == 0


@pytest.fixture(scope="module")
def smollm2() -> tuple[Model, list[list[int]]]:
    try:
        engine = open_engine("smollm2-135m", device="cpu")
    except UserError:
        pytest.skip("smollm2-135m has not been pulled: weft pull smollm2-135m")
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    whole = [tokenizer.encode(text) for text in TEXTS]
    prompts = [*whole, *(ids[:length] for ids, length in zip(whole, (34, 63, 57, 41), strict=True))]
    assert min(map(len, prompts)) > 32
    return engine.model, prompts


def test_a_fast_text_is_never_further_from_the_likeliest_than_declared(smollm2: tuple[Model, list[list[int]]]) -> None:
    model, prompts = smollm2
    fast = furthest(model, prompts, written(model, prompts, fast=True))
    assert fast <= FURTHEST
    exact = written(model, prompts[:2], fast=False, new=6)
    assert furthest(model, prompts[:2], exact) == 0, "without it the distance is none at all"
    # Control: a matrix whose scales are a quarter too large, written with and scored without.
    broken = next(module for name, module in model.named_modules() if name == "blocks.3.mixer.qkv.weight")
    assert isinstance(broken, PackedWeight)
    kept = broken.scale.clone()
    broken.scale.mul_(1.25)
    texts = written(model, prompts[:2], fast=True)
    broken.scale.copy_(kept)
    wrong = furthest(model, prompts[:2], texts)
    print(f"furthest from the likeliest: {fast:.3g} nats with fast, {wrong:.3g} with broken scales")
    assert wrong > FURTHEST


def test_fast_computes_in_8_bits(tiny: Model) -> None:
    packed = tiny.blocks[0].channel.down.weight
    assert isinstance(packed, PackedWeight)
    x = torch.randn(40, packed.shape[1], generator=torch.Generator().manual_seed(0))
    want = x.double() @ packed.dequantise(torch.float64).T

    def error(coarse: bool) -> float:
        with torch.inference_mode(), kernels.settled(torch.float32, torch.device("cpu"), coarse=coarse):
            return ((packed.multiply(x) - want).abs().max() / want.abs().max()).item()

    assert 10 * error(False) < error(True) < 2e-2
