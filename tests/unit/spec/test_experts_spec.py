"""The spec of a mixture of experts: what it counts, and the sentences for what cannot be."""

import pytest

from weft.errors import UserError
from weft.spec import Experts, model_spec

EXPERTS = {"type": "experts", "experts": 8, "top_k": 2, "hidden": 24}


def spec(**fields):
    layer = {"mixer": {"type": "attention", "heads": 2}, "channel": {**EXPERTS, **fields}}
    return model_spec({"vocab": 31, "dim": 16, "layers": [layer, {"channel": {"type": "gated", "hidden": 40}}]})


def test_sizes_are_of_all_experts_and_of_those_a_token_meets():
    channel = Experts(experts=8, top_k=2, hidden=24, shared=1)
    one = 3 * 16 * 24
    assert channel.num_params(16) == 16 * 8 + 9 * one
    assert channel.active_params(16) == 16 * 8 + 3 * one
    assert channel.flops(16, 10) == 2 * 10 * channel.active_params(16)
    assert spec().num_params() - spec().num_params(active=True) == 6 * one
    assert spec(top_k=8).num_params() == spec(top_k=8).num_params(active=True)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_k": 9}, r"top_k is 9 but there are 8 experts; lower top_k or add experts"),
        ({"top_k": 0}, r"top_k is 0, but input should be greater than 0"),
        ({"groups": 3}, r"8 experts do not divide into 3 groups; groups must divide experts"),
        ({"groups": 4, "top_groups": 5}, r"top_groups is 5 but there are 4 groups; it must be from 1 to groups"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, r"top_k is 3 but 1 of 4 groups hold 2 experts; raise top_groups or lower top_k"),
        ({"groups": 8, "top_groups": 2, "group_score": "top2"}, r"group_score is top2 but a group has 1 of the 8 experts"),
        ({"capacity": 0}, r"capacity is 0, but input should be greater than 0"),
        ({"score": "sigmiod"}, r"'sigmiod' is not known at layers.0.channel.score. Did you mean 'sigmoid'\?"),
        ({"topk": 2}, r"unknown key 'topk' .*Did you mean 'top_k'\?"),
    ],
)
def test_bad_input_is_a_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        spec(**fields)
