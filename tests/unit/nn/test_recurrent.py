"""LSTM and GRU: torch's fused op against the loop, and both against torch's own layers."""

import pytest
import torch

from weft.nn import Step, build
from weft.spec import model_spec


def layer(kind, hidden=None):
    spec = model_spec({"vocab": 5, "dim": 6, "layers": [{"mixer": {"type": kind, "hidden": hidden}}]})
    return build(spec, dtype=torch.float64, seed=0).blocks[0].mixer


@pytest.mark.parametrize("hidden", [None, 9])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_fused_equals_loop(kind, hidden):
    mixer = layer(kind, hidden)
    outcomes = []
    for fused in (True, False):
        x = torch.randn(3, 11, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        step = Step.parallel(torch.zeros(3, 11, dtype=torch.long))
        step.plain = fused
        mixer.zero_grad()
        y, _ = mixer(x, step)
        y.square().sum().backward()
        outcomes.append([y.detach(), x.grad, *(parameter.grad.clone() for parameter in mixer.parameters())])
    for want, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kind", "theirs"), [("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)])
def test_weights_of_torchs_layer_load_as_they_are(kind, theirs):
    mixer, reference = layer(kind), theirs(6, 6, batch_first=True, dtype=torch.float64)
    mixer.load_state_dict({name.removesuffix("_l0"): value for name, value in reference.state_dict().items()})
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    step = Step.parallel(torch.zeros(2, 7, dtype=torch.long))
    for plain in (True, False):
        step.plain = plain
        torch.testing.assert_close(mixer(x, step)[0], reference(x)[0], rtol=0, atol=1e-12)
    with torch.no_grad():
        mixer.weight_hh[0, 0] += 0.1
    assert (mixer(x, step)[0] - reference(x)[0]).abs().max() > 1e-5


def test_the_fused_op_is_not_used_where_a_row_restarts():
    """Control: run fused on a packed row, it would carry the first document into the second."""
    mixer = layer("lstm")
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    positions, segments = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    packed, _ = mixer(x, Step.packed(positions, segments))
    alone, _ = mixer(x[:, 4:], Step.parallel(torch.zeros(1, 4, dtype=torch.long)))
    torch.testing.assert_close(packed[:, 4:], alone, rtol=0, atol=1e-12)
    assert (mixer._fused(x)[:, 4:] - alone).abs().max() > 1e-3
