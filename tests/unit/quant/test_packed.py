"""Weights in 4 and 8 bits: what goes in comes out, the product is that of the dequantised matrix, and no row sees another."""

import pytest
import torch

from weft import kernels
from weft.nn.packed import NF4, TiledWeight, multiply_gated

KINDS = [("int8", False), ("int4", False), ("int4", True), ("nf4", False)]


def example(kind, minimum, rows=50, columns=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256 if kind == "int8" else 16, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (0.01 + torch.rand(rows, columns // 32, generator=generator)).half()
    lowest = -torch.rand(rows, columns // 32, generator=generator).half() if minimum else None
    return TiledWeight(rows, columns, kind, minimum).fill(codes, scale, lowest), codes, scale, lowest


@pytest.mark.parametrize(("kind", "minimum"), KINDS)
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_codes_come_back_and_mean_what_the_formula_says(kind, minimum, rows):
    packed, codes, scale, lowest = example(kind, minimum, rows)
    for got, want in zip(packed.unpack(), (codes, scale, lowest), strict=True):
        assert got is want is None or torch.equal(got, want)
    wide = scale.double().repeat_interleave(32, 1)
    levels = torch.tensor(NF4, dtype=torch.float64)[codes.int()] if kind == "nf4" else codes.double() - packed.offset
    want = levels * wide + (lowest.double().repeat_interleave(32, 1) if lowest is not None else 0)
    torch.testing.assert_close(packed.dequantise(torch.float64), want, rtol=0, atol=1e-12)
    ids = torch.tensor([[0, rows - 1]])
    torch.testing.assert_close(packed.rows(ids)[0].double(), want[ids[0]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "minimum"), KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 25])
def test_the_product_is_that_of_the_matrix(kind, minimum, rows):
    packed, *_ = example(kind, minimum)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        got, want = packed.multiply(x), x.double() @ packed.dequantise(torch.float64).T
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error < 6e-5, "16 bits of the activations"
        with kernels.settled(torch.float32, torch.device("cpu"), coarse=True):
            coarse = ((packed.multiply(x) - want).abs().max() / want.abs().max()).item()
        assert coarse < 2e-2
        assert kind == "nf4" or not kernels.available() or coarse > 5 * error, "control: 8 bits are coarser"
        each = torch.cat([packed.multiply(row) for row in x[:, None]])
        assert kind == "nf4" or not kernels.available() or torch.equal(each, got), "a row's bits do not depend on the others"


def test_huge_and_empty_activations():
    packed, *_ = example("int4", True)
    with torch.no_grad():
        assert packed.multiply(torch.zeros(2, 96)).eq(0).all()
        assert packed.multiply(torch.full((1, 96), 1e30)).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_in_its_row(bad):
    packed, *_ = example("int4", True)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    x[1, 40] = bad
    with torch.no_grad():
        finite = packed.multiply(x).isfinite().all(-1)
    assert finite.tolist() == [True, False, True]


def test_a_gated_channel_in_one_call_is_the_same_in_three():
    gate_up, *_ = example("int4", True, rows=64, columns=32)
    down, *_ = example("int4", True, rows=32, columns=32, seed=1)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        if not kernels.available():
            pytest.skip("no kernels here")
        gate, up = gate_up.multiply(x).chunk(2, -1)
        want = down.multiply(torch.nn.functional.silu(gate) * up)
        got = multiply_gated(x, gate_up, down)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_scales_keep_their_bits_when_the_model_changes_its_dtype():
    packed, _, scale, _ = example("int4", True)
    there = packed.to(torch.bfloat16)
    assert there.dtype == torch.bfloat16
    assert torch.equal(there.unpack()[1], scale)
    assert there.to(torch.float64).rows(torch.tensor([3])).dtype == torch.float64
