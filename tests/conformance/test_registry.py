"""Every registered spec has an example in `cases.py`, and specs and modules agree on what they say twice."""

import pytest
import torch
from cases import CHANNELS, MIXERS, NAMES, SPECS, make

from weft.nn import registered
from weft.spec import model_spec
from weft.spec.base import Leaf


def test_every_registered_part_has_a_case():
    covered = {case["type"] for case in (*MIXERS.values(), *CHANNELS.values())}
    assert {spec.model_fields["type"].default for spec in registered()} == covered


@pytest.mark.parametrize("name", NAMES)
def test_spec_counts_what_the_module_holds(name):
    model = make(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == SPECS[name].num_params()
    assert model.state_spec() == SPECS[name].state()


@pytest.mark.parametrize("name", NAMES)
def test_spec_round_trips(name):
    import json

    import yaml

    spec = SPECS[name]
    assert model_spec(json.loads(spec.to_json())) == spec
    assert model_spec(yaml.safe_load(spec.to_yaml())) == spec


@pytest.mark.parametrize("name", NAMES)
def test_models_own_no_state(name):
    """Buffers of a model are constants of its spec: running it changes none of them."""
    from cases import make_memory, make_tokens

    model = make(name)
    before = {key: value.clone() for key, value in model.named_buffers()}
    with torch.no_grad():
        model(make_tokens(), memory=make_memory())
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


def test_state_bytes_are_the_sum_of_leaves():
    assert Leaf("ring", (2, 8), window=6).num_bytes(100, 2) == 6 * 16 * 2
    assert Leaf("append", (2, 8)).num_bytes(100, 2) == 100 * 16 * 2
    assert Leaf("fixed", (4,), dtype="float32").num_bytes(100, 2) == 16
