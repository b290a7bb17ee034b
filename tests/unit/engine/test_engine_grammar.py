"""Constrained output: the form is kept, free rows beside it are left alone, and what cannot be followed is refused at once."""

import json
import re

import pytest
import torch
from engine_cases import llama

from weft.engine import Engine, Grammar, Request, SamplingParams
from weft.engine.draft import NgramDrafter
from weft.engine.grammar import GrammarCompiler, constrain
from weft.errors import UserError
from weft.tokenizer import Settings, Tokenizer
from weft.tokenizer.train import train_tokenizer

TEXT = "".join(f'Line {i}: {{"name": "fox", "count": {i}}} the quick brown fox, "jumps" over the lazy dog.\n' for i in range(80))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blau", "été"]}, "maxItems": 2},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("bpe", [TEXT], 320)


@pytest.fixture
def engine(tokenizer):
    return Engine(llama(tokenizer.vocab_size, context=256), tokenizer, rows=4)


def valid(text):
    value = json.loads(text)
    assert list(value) == ["name", "count", "tags"]
    assert len(value["name"]) <= 12
    assert 0 <= value["count"] <= 99
    assert set(value["tags"]) <= {"red", "blau", "été"}
    return True


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_a_schema_is_kept_by_a_model_that_knows_none(engine, temperature):
    params = SamplingParams(temperature=temperature, n=4 if temperature else 1, seed=5, grammar=Grammar.json_schema(SCHEMA))
    results = engine.generate([Request("the quick", params)])
    assert all(result.finish_reason == "stop" and valid(result.text) for result in results)
    free = engine.generate([Request("the quick", SamplingParams(max_tokens=60))])[0]
    with pytest.raises(ValueError):
        json.loads(free.text)  # without the grammar this model writes no JSON


@pytest.mark.parametrize(("kind", "source", "pattern"), [
    ("regex", "[0-9]{4}-[01][0-9]", "[0-9]{4}-[01][0-9]"),
    ("regex", "(ab|cd)* ?[é-ü]!", "(ab|cd)* ?[é-ü]!"),
    ("lark", 'start: "(" start ")" | "x"', r"\(*x\)*"),
])  # fmt: skip
def test_expressions_and_grammars_are_kept(engine, kind, source, pattern):
    params = SamplingParams(temperature=1.0, n=4, seed=1, max_tokens=200, grammar=Grammar(kind, source))
    for result in engine.generate([Request("over", params)]):
        assert result.finish_reason == "stop"
        assert re.fullmatch(pattern, result.text)
        assert result.text.count("(") == result.text.count(")")


def test_rows_beside_it_are_not_touched(engine):
    free = [Request(text, SamplingParams(max_tokens=30, temperature=t, seed=3)) for text, t in (("Line 7", 0.0), ("the", 1.0))]
    held = Request("Line 9: ", SamplingParams(temperature=1.0, seed=2, grammar=Grammar.json_schema(SCHEMA)))
    alone = [engine.generate([request])[0].ids for request in (*free, held)]
    assert [result.ids for result in engine.generate([free[0], held, free[1]])] == [alone[0], alone[2], alone[1]]


def test_drafts_and_lost_state_change_nothing(tokenizer):
    held = [SamplingParams(temperature=t, seed=n, max_tokens=60, grammar=Grammar.json_schema(SCHEMA)) for n, t in enumerate((0, 1, 0, 2))]
    free = SamplingParams(max_tokens=40, logit_bias={5: 3.0})
    requests = [Request(f"Line {n}: the quick", params) for n, params in enumerate([*held, free, free])]
    model = llama(tokenizer.vocab_size, context=256)
    right = [Engine(model, tokenizer, cache=False).generate([request])[0].ids for request in requests]
    drafting = Engine(model, tokenizer, rows=6, draft=NgramDrafter())
    assert [result.ids for result in drafting.generate(requests)] == right
    crowded = Engine(model, tokenizer, rows=6, page=4)
    crowded._lanes.max_pages = 36
    crowded._lanes.arena.allow_pages(36, 36)
    assert [result.ids for result in crowded.generate(requests)] == right
    assert crowded.stats.preemptions > 0


def test_an_end_token_comes_only_where_the_text_is_complete(engine, tokenizer):
    end = tokenizer.eos_ids[0]
    eager = {end: 100.0}
    three = Grammar("regex", "[a-z]{3,5}")
    result = engine.generate([Request("the", SamplingParams(logit_bias=eager, grammar=three))])[0]
    assert (result.ids[-1], result.finish_reason) == (end, "stop")
    assert len(result.text) >= 3 > len(tokenizer.decode(result.ids[:-2]))
    never = engine.generate([Request("the", SamplingParams(logit_bias={end: -100.0}, grammar=three))])[0]
    assert (len(never.text), never.finish_reason) == (5, "stop")
    assert never.ids[-1] != end  # nothing may follow five letters, so no end token is needed
    assert engine.generate([Request("the", SamplingParams(logit_bias=eager))])[0].ids == (end,)


def test_without_an_end_token_the_grammar_ends_the_text(tokenizer):
    endless = Tokenizer(tokenizer.backend, Settings())
    endless.__dict__["eos_ids"] = ()
    result = Engine(llama(tokenizer.vocab_size), endless).generate([Request("the", SamplingParams(grammar=Grammar("regex", "[a-z]{4}")))])
    assert re.fullmatch("[a-z]{4}", result[0].text)


def test_a_cut_text_says_so(engine):
    result = engine.generate([Request("the", SamplingParams(max_tokens=3, grammar=Grammar.json_schema(SCHEMA)))])[0]
    assert (result.finish_reason, len(result.ids)) == ("length", 3)


def test_a_model_with_more_logits_than_tokens_is_held_to_the_tokens(tokenizer):
    engine = Engine(llama(tokenizer.vocab_size + 11), tokenizer)
    result = engine.generate([Request("the", SamplingParams(temperature=5.0, seed=1, n=8, grammar=Grammar("regex", "(?s:.{20})")))])
    assert all(max(r.ids) < tokenizer.vocab_size and len(r.text) == 20 for r in result)


@pytest.mark.parametrize(("kind", "source", "said"), [
    ("regex", "(", "unclosed group"),
    ("regex", r"[^\s\S]", "cannot be satisfied"),
    ("regex", "", "empty text alone"),
    ("lark", "start: nope", "unknown name"),
    ("lark", "not a grammar", "the grammar cannot be used"),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
    ("json_schema", '{"not": {"type": "string"}}', "Unimplemented keys"),
    ("json_schema", '{"$ref": "#/nowhere"}', "does not exist"),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused_at_once(engine, kind, source, said):
    with pytest.raises(UserError, match=said) as caught:
        engine.submit(Request("the", SamplingParams(grammar=Grammar(kind, source))))
    assert "\n" not in str(caught.value)
    assert not engine.busy


@pytest.mark.parametrize("source", ["{", "[]", "false", "[" * 100_000, "nan"])
def test_a_schema_that_is_none_is_refused(source):
    with pytest.raises(UserError, match="the JSON schema is"):
        Grammar("json_schema", source)


def test_what_does_not_go_together_is_refused(engine, tokenizer):
    grammar = Grammar("regex", "a")
    with pytest.raises(UserError, match="beam search does not follow grammars"):
        SamplingParams(beams=2, grammar=grammar)
    with pytest.raises(UserError, match="no tokenizer"):
        Engine(llama()).submit(Request([1, 2], SamplingParams(grammar=grammar)))
    with pytest.raises(UserError, match="the grammar's kind is 'abnf'"):
        Grammar("abnf", "a")
    with pytest.raises(UserError, match="token id 999, but the model's ids go from 0"):
        engine.submit(Request("the", SamplingParams(logit_bias={999: 1.0})))
    for bias in ({-1: 1.0}, {"7": 1.0}, {7: float("nan")}, {7: float("inf")}):
        with pytest.raises(UserError, match="logit_bias"):
            SamplingParams(logit_bias=bias)


def test_the_mask_is_what_the_grammar_allows(tokenizer):
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size).matcher(Grammar("regex", "ab+"))
    logits = torch.randn(2, tokenizer.vocab_size)
    masked = constrain(logits, [None, matcher])
    assert torch.equal(masked[0], logits[0])
    allowed = {tokenizer.token_bytes(index) for index in masked[1].isfinite().nonzero().flatten().tolist()}
    assert allowed
    assert all(re.fullmatch(b"ab*", token) for token in allowed)
    assert torch.equal(masked[1][matcher.allowed], logits[1][matcher.allowed])


def test_bias_goes_before_everything_else(engine, tokenizer):
    favourite = tokenizer.encode("q", bos=False)[0]
    loud = engine.generate([Request("the", SamplingParams(max_tokens=5, logit_bias={favourite: 100.0}, ignore_eos=True, logprobs=True))])[0]
    assert loud.ids == (favourite,) * 5
    assert all(token.logprob < -1e-3 for token in loud.logprobs)  # reported of the model itself
    plain = engine.generate([Request("the", SamplingParams(max_tokens=5))])[0]
    barred = engine.generate([Request("the", SamplingParams(max_tokens=5, logit_bias={plain.ids[0]: -100.0}))])[0]
    assert plain.ids[0] not in barred.ids
