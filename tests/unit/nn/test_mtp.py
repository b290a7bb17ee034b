"""Modules for multi-token prediction: against a definition written with loops, packed and alone, saved and read, counted."""

import pytest
import torch
from torch.nn.functional import pad

from weft.errors import UserError
from weft.nn import Step, build
from weft.spec import model_spec
from weft.weights.load import load_model
from weft.weights.save import save_model

VOCAB, DIM = 31, 16


def spec(mtp, **fields):
    layers = [
        {"mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 24}, "repeat": 2}
    ]
    return model_spec({"vocab": VOCAB, "dim": DIM, "layers": layers, "norm": {"type": "rms"}, "init_std": 0.3, "mtp": mtp, **fields})


def make(kind="sequential", depth=2, dtype=torch.float64, **fields):
    return build(spec({"type": kind, "depth": depth}, **fields), dtype=dtype, seed=0)


def tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def foretold(model, row):
    """Hidden states of every depth for one document [T], written as the papers have it: a sequence cut short for each depth."""
    with torch.no_grad():
        hidden = model(row[None]).hidden
        found = []
        for k, module in enumerate(model.mtp, 1):
            length = len(row) - k
            step = Step.parallel(row[None, :length])
            if model.spec.mtp.type == "independent":
                found.append(module.norm(module.block(hidden, Step.parallel(row[None]))[0])[0])
                continue
            both = torch.cat([module.enorm(model.embed(row[None, k:])), module.hnorm(hidden[:, :length])], -1)
            hidden = module.norm(module.block(both @ module.eh_proj.weight.T, step)[0])
            found.append(hidden[0])
        return found


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_hidden_states_are_those_of_the_definition(kind):
    model, row = make(kind, 3).eval(), tokens(11)
    aux = model(row[None], ahead=True).aux
    for k, want in enumerate(foretold(model, row), 1):
        assert (aux[f"mtp.{k}"][0, : len(want)] - want).abs().max() < 1e-12
    assert (aux["mtp.1"] - aux["mtp.2"]).abs().max() > 0.1, "control: depths differ"
    assert "mtp.1" not in model(row[None]).aux, "nobody pays who did not ask"
    assert torch.equal(model(row[None], ahead=True).hidden, model(row[None]).hidden)


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_packed_documents_do_not_see_each_other(kind):
    model = make(kind, 2).eval()
    documents = [tokens(length, seed=length) for length in (7, 3, 9)]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    segments = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])[None]
    aux = model(torch.cat(documents)[None], Step.packed(positions, segments), ahead=True).aux
    start = 0
    for document in documents:
        for k, want in enumerate(foretold(model, document), 1):
            usable = len(document) - k  # beyond it there is no token k places on
            assert (aux[f"mtp.{k}"][0, start : start + usable] - want[:usable]).abs().max() < 1e-12
        start += len(document)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        model.gradient_checkpointing = checkpointing
        model(tokens(2, 9), ahead=True).aux["mtp.2"][:, :-2].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.mtp.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_counts_leave_the_modules_out_and_tell_them_apart(kind):
    plain, model = spec(None), make(kind, 3)
    assert model.spec.num_params() == plain.num_params()
    assert model.spec.mtp_params() == sum(parameter.numel() for parameter in model.mtp.parameters())
    assert plain.mtp_params() == plain.mtp_flops(9) == plain.mtp_state_bytes(9) == 0
    assert model.spec.mtp_state_bytes(9) == 3 * plain.state_bytes(9) // 2
    work = 3 * (plain.flops(9) - 2 * 9 * DIM * VOCAB) // 2 + 3 * 2 * 9 * DIM * VOCAB
    assert model.spec.mtp_flops(9) == work + (3 * 9 * 4 * DIM * DIM if kind == "sequential" else 0)


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_round_trips_through_a_folder(kind, tmp_path):
    model = make(kind, 2, torch.float32).eval()
    save_model(model, tmp_path / "model")
    back = load_model(tmp_path / "model").model
    assert back.spec.mtp == model.spec.mtp
    row = tokens(1, 9)
    assert torch.equal(back(row, ahead=True).aux["mtp.2"], model(row, ahead=True).aux["mtp.2"])


def test_a_depth_that_cannot_be_is_refused_with_a_sentence():
    with pytest.raises(UserError, match=r"mtp.depth is 0"):
        spec({"depth": 0})
    with pytest.raises(UserError, match=r"'parallel' is not known at mtp.type"):
        spec({"type": "parallel"})


def test_padding_is_inert():
    model, rows = make().eval(), tokens(2, 9)
    aux = model(rows, Step.parallel(rows, torch.tensor([9, 5])), ahead=True).aux["mtp.1"]
    assert torch.isfinite(aux).all()
    alone = model(pad(rows[1:, :5], (0, 1)), ahead=True).aux["mtp.1"]
    assert (aux[1, :4] - alone[0, :4]).abs().max() < 1e-12
