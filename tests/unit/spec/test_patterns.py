"""Sparse patterns: what they say of themselves against their rule, position by position, and what they refuse."""

import pytest

from weft.errors import UserError
from weft.spec import Band, Dilated, Fixed, Streaming, Strided, model_spec

PARTS = ("both", "local", "far")
PATTERNS = [
    *(Strided(stride=stride, part=part) for stride in (2, 5) for part in PARTS),
    *(Fixed(stride=stride, summary=c, part=part) for stride, c in ((2, 1), (5, 2), (4, 3)) for part in PARTS),
    *(Dilated(window=window, dilation=d, global_tokens=g) for window, d, g in ((3, 2, 0), (4, 3, 5), (1, 1, 2))),
    *(Streaming(window=window, sinks=sinks) for window, sinks in ((1, 1), (6, 4))),
]
LENGTH = 31


def seen(pattern, query):
    return {key for key in range(query + 1) if pattern.allows(query, key)}


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_what_a_pattern_says_follows_from_its_rule(pattern):
    for length in range(LENGTH):
        assert pattern.pairs(length) == sum(len(seen(pattern, query)) for query in range(length))
    assert all(query in seen(pattern, query) for query in range(LENGTH)), "a query always has a key to look at"
    furthest = max(query - key for query in range(LENGTH) for key in seen(pattern, query) if key >= pattern.pinned)
    if pattern.reach is None:
        assert furthest > LENGTH - 8
    else:
        assert furthest == pattern.reach - 1
    if pattern.band is not None:
        assert all(seen(pattern, query) == seen(pattern.band, query) for query in range(LENGTH))


def test_the_rules_are_those_of_the_papers():
    assert seen(Strided(stride=4), 11) == {3, 7, 8, 9, 10, 11}
    assert seen(Strided(stride=4, part="local"), 11) == {7, 8, 9, 10, 11}
    assert seen(Fixed(stride=4, summary=1), 9) == {3, 7, 8, 9}
    assert seen(Fixed(stride=4, summary=2), 9) == {2, 3, 6, 7, 8, 9}
    assert seen(Fixed(stride=4, summary=1, part="far"), 9) == {3, 7, 9}
    assert seen(Dilated(window=3, dilation=2, global_tokens=2), 9) == {0, 1, 5, 7, 9}
    assert seen(Streaming(window=3, sinks=2), 9) == {0, 1, 7, 8, 9}


def test_two_factorised_steps_reach_every_token():
    """Section 4.2 of the paper: whatever a token cannot see directly, it sees through one that does."""
    for pattern in (Strided(stride=5), Fixed(stride=5)):
        for query in range(LENGTH):
            through = set().union(*(seen(pattern, middle) for middle in seen(pattern, query)))
            assert through == set(range(query + 1))
    assert set().union(*(seen(Band(5), middle) for middle in seen(Band(5), 30))) != set(range(31)), "control: windows do not"


def spec(**mixer):
    return model_spec({"vocab": 9, "dim": 8, "layers": [{"mixer": {"type": "attention", "heads": 2, **mixer}}]})


@pytest.mark.parametrize(
    ("mixer", "sentence"),
    [
        ({"window": -3}, r"window is -3, but"),
        ({"pattern": {"type": "strided", "stride": 1}}, r"stride is 1, but input should be greater than or equal to 2"),
        ({"pattern": {"type": "strided", "stride": 4, "part": "near"}}, r"'near' is not known.*Allowed: both, local, far"),
        ({"pattern": {"type": "fixed", "stride": 4, "summary": 4}}, r"summary is 4 and stride 4; .*give less than stride"),
        ({"pattern": {"type": "fixed", "stride": 4, "summary": 0}}, r"summary is 0, but"),
        ({"pattern": {"type": "dilated", "window": 0}}, r"window is 0, but"),
        ({"pattern": {"type": "dilated", "window": 4, "dilation": 0}}, r"dilation is 0, but"),
        ({"pattern": {"type": "dilated", "window": 4, "dilation": 2, "global_tokens": -1}}, r"global_tokens is -1, but"),
        ({"pattern": {"type": "dilated", "window": 1, "dilation": 2}}, r"dilation is 2 with window 1; one key has no gaps"),
        ({"pattern": {"type": "dilated", "window": 4}}, r"neither dilation above 1 nor global_tokens"),
        ({"pattern": {"type": "streaming", "window": 4, "sinks": 0}}, r"sinks is 0, but"),
        ({"pattern": {"type": "stridded", "stride": 4}}, r"'stridded' is not known.*Did you mean 'strided'\?"),
        ({"pattern": {"type": "strided", "strid": 4}}, r"unknown key 'strid'.*Did you mean 'stride'\?"),
        ({"window": 4, "pattern": {"type": "strided", "stride": 4}}, r"window and a strided pattern are both given"),
        ({"causal": False, "pattern": {"type": "strided", "stride": 4}}, r"pattern is given with causal: false"),
    ],
)
def test_bad_patterns_are_refused_with_a_sentence(mixer, sentence):
    with pytest.raises(UserError, match=sentence):
        spec(**mixer)


def test_state_and_work_are_bounded_where_a_query_looks_back_a_bounded_way():
    entry = 2 * 8 * 2  # keys and values of 8 channels, two bytes each
    assert spec(window=16).state_bytes(1000) == 16 * entry
    assert spec(pattern={"type": "streaming", "window": 16, "sinks": 4}).state_bytes(1000) == 20 * entry
    assert spec(pattern={"type": "streaming", "window": 16, "sinks": 4}).state_bytes(18) == 18 * entry
    assert spec(pattern={"type": "dilated", "window": 5, "dilation": 3, "global_tokens": 2}).state_bytes(1000) == (13 + 2) * entry
    assert spec(pattern={"type": "fixed", "stride": 16, "part": "local"}).state_bytes(1000) == 16 * entry
    assert spec(pattern={"type": "fixed", "stride": 16}).state_bytes(1000) == 1000 * entry
    dense, sparse = (spec(**fields).flops(4096) for fields in ({}, {"pattern": {"type": "fixed", "stride": 64}}))
    assert sparse < dense / 10
    assert spec(sink_logits=True).num_params() == spec().num_params() + 2
