"""GGUF metadata as a spec and back, without any file."""

from typing import Any

import pydantic
import pytest

from weft.errors import UserError
from weft.spec import Llama3Scaling, ModelSpec, model_spec
from weft.zoo import ENTRIES
from weft.zoo.family import canonical
from weft.zoo.llama_gguf import from_gguf, llama3_factors, rope_factors, rules, to_gguf
from weft.zoo.rules import Cat, One

NAMES = ["llama-7b", "llama2-70b", "llama3.1-8b", "llama3.2-1b", "smollm2-135m", "tinyllama-1.1b", "mistral-7b-v0.3"]
WEIRD = [None, -1, 0, 10**30, 1.5, float("nan"), float("inf"), True, "x", "", [], [1, 2], {}]


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    named: dict[str, tuple[int, ...]] = {}
    for row in rules(spec):
        sources = row.sources if isinstance(row, Cat) else (row.source,) if isinstance(row, One) else ()
        named |= {source.name: (spec.vocab, spec.dim) for source in sources}
    return named


@pytest.mark.parametrize("name", NAMES)
def test_metadata_round_trips(name: str) -> None:
    spec = ENTRIES[name].spec
    back = from_gguf({"general.architecture": "llama", **to_gguf(spec)}, shapes(spec), rope_factors(spec))
    assert canonical(back) == canonical(spec)


@pytest.mark.parametrize("name", ["gpt2", "mistral-7b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma2-2b", "mamba-130m"])
def test_what_gguf_llama_cannot_say_is_refused(name: str) -> None:
    if name == "qwen2.5-0.5b":  # llama with biases on queries, keys and values: the architecture has room for them
        assert to_gguf(ENTRIES[name].spec)
        return
    with pytest.raises(UserError, match="Llama family"):
        to_gguf(ENTRIES[name].spec)


def test_another_activation_is_refused() -> None:
    mixer = {"type": "attention", "heads": 2, "rope": {}}
    layer = {"mixer": mixer, "channel": {"type": "gated", "hidden": 9, "activation": "gelu"}}
    with pytest.raises(UserError, match="SiLU"):
        to_gguf(model_spec({"vocab": 11, "dim": 8, "norm": {"type": "rms"}, "layers": [layer]}))


def test_llama3_factors_are_one_for_short_waves_and_the_factor_for_long_ones() -> None:
    factors = llama3_factors(Llama3Scaling(factor=8.0), 500000.0, 128)
    assert len(factors) == 64
    assert factors[0] == 1
    assert factors[-1] == 8
    assert factors == sorted(factors)
    assert any(1 < factor < 8 for factor in factors)


def test_the_old_word_for_linear_scaling_counts() -> None:
    spec = ENTRIES["llama-7b"].spec
    metadata = {"general.architecture": "llama", **to_gguf(spec), "llama.rope.scale_linear": 4.0}
    assert canonical(from_gguf(metadata, shapes(spec))) != canonical(spec)


@pytest.mark.parametrize("name", ["llama3.2-1b", "smollm2-135m"])
def test_no_value_of_any_key_does_more_than_be_refused(name: str) -> None:
    spec = ENTRIES[name].spec
    metadata: dict[str, Any] = {"general.architecture": "llama", **to_gguf(spec)}
    more = ("type", "factor", "attn_factor", "original_context_length")
    tensors, factors, refused = shapes(spec), rope_factors(spec), 0
    for key in [*metadata, *(f"llama.rope.scaling.{word}" for word in more)]:
        for value in WEIRD:
            try:
                from_gguf({**metadata, key: value}, tensors, factors)
            except (UserError, pydantic.ValidationError):  # the second is told as a sentence by the loader, which knows the file
                refused += 1
    assert refused > 150
