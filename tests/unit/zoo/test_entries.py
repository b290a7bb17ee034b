"""The published sizes: counts against their sources, and every one through its config.json and back."""

import subprocess
import sys

import pytest

from weft.errors import UserError
from weft.zoo import ENTRIES, FAMILIES, describe, entry, family_of, from_config
from weft.zoo.family import Entry, canonical

NAMES = """
    gpt gpt2 gpt2-medium gpt2-large gpt2-xl gpt3-small gpt3-medium gpt3-large gpt3-xl gpt3-2.7b gpt3-6.7b gpt3-13b gpt3-175b
    llama-7b llama-13b llama-33b llama-65b llama2-7b llama2-13b llama2-70b llama3-8b llama3-70b llama3.1-8b llama3.1-70b
    llama3.1-405b llama3.2-1b llama3.2-3b llama3.3-70b mistral-7b smollm2-135m smollm2-360m smollm2-1.7b
    qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b qwen2.5-7b qwen2.5-14b qwen2.5-32b qwen2.5-72b
    qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-32b gemma2-2b gemma2-9b gemma2-27b
    gemma3-270m gemma3-1b gemma3-4b gemma3-12b gemma3-27b gptneo-125m gptneo-1.3b gptneo-2.7b gpt3-small-sparse gpt3-175b-sparse
    mixtral-8x7b mixtral-8x22b qwen3-30b-a3b qwen3-235b-a22b mamba-130m mamba-370m mamba-790m mamba-1.4b mamba-2.8b
"""


def test_every_promised_name_is_there() -> None:
    assert not set(NAMES.split()) - set(ENTRIES)


@pytest.mark.parametrize("row", ENTRIES.values(), ids=lambda row: row.name)
def test_counts_match_their_source(row: Entry) -> None:
    assert row.spec.num_params() == pytest.approx(row.published, rel=0.02)
    assert row.source


def test_counts_taken_from_weights_match_exactly() -> None:
    exact = [row for row in ENTRIES.values() if row.source == "tensor index of the Hugging Face repo"]
    assert len(exact) > 30
    assert [row.name for row in exact if row.spec.num_params() != row.published] == []


def test_misprinted_widths_of_gpt3_are_declared_and_would_not_fit() -> None:
    """The paper's table 2.1: XL's 24 heads of 128 and 13B's d_model 5140 contradict the rest of their rows."""
    assert {row.name.removesuffix("-sparse") for row in ENTRIES.values() if row.misprint} == {"gpt3-xl", "gpt3-13b"}
    xl, large = ENTRIES["gpt3-xl"].spec, ENTRIES["gpt3-13b"].spec
    assert (xl.dim, xl.blocks()[0].mixer.heads) == (2048, 16)
    assert (large.dim, large.blocks()[0].mixer.heads) == (5120, 40)
    with pytest.raises(ValueError, match="multiple of heads"):
        type(large).model_validate({**large.model_dump(), "dim": 5140})


def test_sparse_sizes_of_gpt3_alternate_and_weigh_as_much_as_dense_ones() -> None:
    for name, row in ENTRIES.items():
        if name.startswith("gpt3-") and not name.endswith("-sparse"):
            sparse = ENTRIES[f"{name}-sparse"].spec
            assert sparse.num_params() == row.spec.num_params()
            assert sparse.state_bytes(2048) < row.spec.state_bytes(2048)
            assert {block.mixer.window for block in sparse.blocks()[::2]} == {None}
            assert {block.mixer.window for block in sparse.blocks()[1::2]} == {256}


@pytest.mark.parametrize("row", ENTRIES.values(), ids=lambda row: row.name)
def test_every_size_is_saved_as_its_family_and_reads_back(row: Entry) -> None:
    family, config = describe(row.spec, prefer=FAMILIES[row.family])
    assert family.name == row.family
    back = from_config({"model_type": family.model_type, **config})[1]
    assert canonical(back) == canonical(row.spec)
    assert back.num_params() == row.spec.num_params()


@pytest.mark.parametrize(
    "row",
    [
        ENTRIES[name]
        for name in ("gpt2", "llama3.2-1b", "qwen3-0.6b", "qwen3-30b-a3b", "gemma2-2b", "gemma3-1b", "gptneo-125m", "mamba-130m", "gpt")
    ],
    ids=lambda r: r.name,
)
def test_weight_map_names_every_tensor_once(row: Entry) -> None:
    rules = FAMILIES[row.family].rules(row.spec)
    ours = [rule.ours for rule in rules if hasattr(rule, "ours")]
    assert len(ours) == len(set(ours))
    assert all(name.startswith(("embed", "position", "blocks.", "norm", "head")) for name in ours)


def test_a_hybrid_is_kept_in_wefts_own_family() -> None:
    from weft.spec import model_spec

    layers = [{"mixer": {"type": "lstm"}}, {"mixer": {"type": "attention", "heads": 2}, "channel": {"type": "mlp", "hidden": 9}}]
    spec = model_spec({"vocab": 11, "dim": 6, "layers": layers})
    family, config = describe(spec)
    assert family.name == "weft"
    assert from_config({"model_type": "weft", **config})[1] == spec


@pytest.mark.parametrize(
    "change",
    [
        {"norm": {"type": "layer"}},
        {"final_norm": False},
        {"head_bias": True},
        {"scale_embeddings": True},
        {"logit_softcap": 30.0},
        {"position": {"type": "learned", "length": 64}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_no_family_claims_a_llama_with_something_extra(change: dict) -> None:
    """Control for `expresses`: a spec that a config cannot say must not be saved as one that computes something else."""
    from weft.spec import model_spec

    mixer = {"type": "attention", "heads": 2, "rope": {}}
    plain = {
        "vocab": 11,
        "dim": 8,
        "context": 64,
        "norm": {"type": "rms"},
        "layers": [{"mixer": mixer, "channel": {"type": "gated", "hidden": 9}}],
    }
    assert family_of(model_spec(plain)).name == "llama"
    assert family_of(model_spec({**plain, **change})).name == "weft"


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'llama3\.1-8b'"):
        entry("llama31-8b")


def test_the_zoo_does_not_import_torch() -> None:
    code = "import sys, weft.zoo; [e.spec.num_params() for e in weft.zoo.ENTRIES.values()]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
