"""Specs refuse what cannot be, in one sentence that names the nearest right word."""

import subprocess
import sys

import pytest

from weft.errors import UserError
from weft.spec import model_spec, read_model_spec

ATTENTION = {"type": "attention", "heads": 2}


def spec(**fields):
    return model_spec({"vocab": 9, "dim": 8, "layers": [{"mixer": ATTENTION}], **fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"vocb": 3}, r"unknown key 'vocb'.*Did you mean 'vocab'\?.*Allowed here: context, dim"),
        ({"layers": [{"mixer": {"type": "attention", "heds": 2}}]}, r"'heds' at layers.0.mixer.heds.*Did you mean 'heads'\?"),
        ({"layers": [{"mixer": {"type": "atention", "heads": 2}}]}, r"'atention' is not known.*Did you mean 'attention'\?"),
        ({"layers": [{"mixr": ATTENTION}]}, r"unknown key 'mixr'.*Did you mean 'mixer'\?"),
        ({"layers": [{"repeat": 2, "layers": [{"chanel": 1}]}]}, r"unknown key 'chanel'.*Did you mean 'channel'\?"),
        ({"layers": [{"topology": "pree", "mixer": ATTENTION}]}, r"'pree' is not known.*Did you mean 'pre'\?"),
        ({"layers": []}, r"layers is \[\], but .* at least 1 item"),
        ({"layers": [{}]}, r"a layer has neither mixer, cross nor channel"),
        ({"dim": -8}, r"dim is -8, but input should be greater than 0"),
        ({"layers": [{"mixer": {**ATTENTION, "heads": 3}}]}, r"dim is 8 and heads 3; dim must be a multiple"),
        ({"layers": [{"mixer": {**ATTENTION, "heads": 4, "kv_heads": 3}}]}, r"heads is 4 and kv_heads 3"),
        ({"layers": [{"mixer": {**ATTENTION, "window": 0}}]}, r"window is 0, but"),
        ({"layers": [{"mixer": {**ATTENTION, "window": 4, "causal": False}}]}, r"window is given with causal: false"),
        ({"dim": 6, "layers": [{"mixer": {**ATTENTION, "rope": {}}}]}, r"head_dim is 3; rotary positions need an even one"),
        ({"position": {"type": "learned", "length": 8}}, r"context is 2048 but the learned position table has 8 rows"),
        ({"dropout": {"embed": 1.0}}, r"dropout.embed is 1.0, but input should be less than 1"),
        ({"layers": [{"mixer": {"type": "mamba", "conv": 1}}]}, r"conv is 1, but"),
    ],
)
def test_bad_specs_are_refused_with_a_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        spec(**fields)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="the key 'layers' is missing"):
        model_spec({"vocab": 9, "dim": 8})


def test_files_are_read_with_sentences(tmp_path):
    good = tmp_path / "good.yaml"
    good.write_text(spec().to_yaml())
    assert read_model_spec(good) == spec()
    with pytest.raises(UserError, match="there is no file"):
        read_model_spec(tmp_path / "none.yaml")
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_model_spec(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_model_spec(bad)


def test_specs_are_frozen_hashable_values():
    a, b = spec(), spec()
    assert a == b
    assert hash(a) == hash(b)
    with pytest.raises(ValueError, match="frozen"):
        a.dim = 16


def test_flops_of_a_dense_model_are_near_two_a_parameter():
    big = spec(vocab=1000, dim=64, layers=[{"repeat": 4, "mixer": ATTENTION, "channel": {"type": "mlp", "hidden": 256}}])
    matrices = big.num_params(embeddings=False) + 1000 * 64
    assert big.flops(1) == pytest.approx(2 * matrices, rel=0.02)
    assert big.flops(512) / 512 > big.flops(1)


def test_a_window_bounds_state_and_work():
    full, window = spec(), spec(layers=[{"mixer": {**ATTENTION, "window": 16}}])
    assert full.state_bytes(1024) == 64 * window.state_bytes(1024)
    assert window.flops(1024) < full.flops(1024)
    assert window.flops(16) == full.flops(16)


def test_importing_specs_does_not_import_torch():
    code = "import sys, weft, weft.spec, weft.errors, weft.files, weft.device, weft.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
