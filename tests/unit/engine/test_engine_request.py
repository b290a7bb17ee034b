"""What may be asked, and how a mistake is told."""

import math

import pytest
from engine_cases import SPECS, llama, memory_for, model_of, random_ids

from weft.engine import Engine, Request, SamplingParams
from weft.errors import UserError
from weft.nn import build
from weft.spec import model_spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", "much"),
        ("length_penalty", math.nan),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", ("",)),
        ("n", 0),
        ("beams", 0),
        ("top_logprobs", -1),
    ],
)
def test_impossible_parameters_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field.partition("_penalty")[0] if field != "stop" else "stop string"):
        SamplingParams(**{field: value})


def test_possible_parameters_are_taken():
    params = SamplingParams(max_tokens=1, temperature=0.001, top_p=1e-3, seed=0, stop="one")
    assert params.stop == ("one",)
    assert SamplingParams(presence_penalty=-2, length_penalty=-1.0, temperature=1).penalised


def test_beams_do_not_sample():
    with pytest.raises(UserError, match=r"beams is 4 and temperature 0\.7"):
        SamplingParams(beams=4, temperature=0.7)
    with pytest.raises(UserError, match="n is 5 and beams 4"):
        SamplingParams(beams=4, n=5)


def refuse(engine, match, prompt, params=None, memory=None):
    with pytest.raises(UserError, match=match):
        engine.submit(Request(prompt, params or SamplingParams(max_tokens=2), memory))
    assert not engine.busy


def test_impossible_prompts_are_refused():
    engine = Engine(llama(), rows=2)
    refuse(engine, "no tokens", [])
    refuse(engine, "129 tokens and the model's context is 128", random_ids(129, vocab=97))
    refuse(engine, "token id 97, but the model's ids go from 0 to 96", [5, 97])
    refuse(engine, "token id -1", [-1])
    refuse(engine, "no tokenizer", "some text")
    refuse(engine, "no tokenizer", [1], SamplingParams(stop="x"))
    refuse(engine, "beams is 3 and the engine has 2 rows", [1], SamplingParams(beams=3))
    refuse(engine, "no cross-attention", [1], memory=memory_for("cross", 1))


def test_cross_attention_needs_a_memory_that_fits():
    engine = Engine(model_of("cross"))
    refuse(engine, "memory is missing", [1])
    with pytest.raises(UserError, match="takes at most 9"):
        engine.generate([Request([1], SamplingParams(max_tokens=1), memory_for("cross", 20))])


def test_a_model_that_sees_the_future_is_refused():
    layer = {"mixer": {"type": "attention", "heads": 2, "causal": False}}
    model = build(model_spec({"vocab": 11, "dim": 8, "layers": [layer]}), seed=0)
    with pytest.raises(UserError, match="causal: false"):
        Engine(model)


def test_every_model_of_the_suite_can_be_asked():
    for name in SPECS:
        assert Engine(model_of(name)).generate([Request([1, 2], SamplingParams(max_tokens=1), memory_for(name, 0))])
