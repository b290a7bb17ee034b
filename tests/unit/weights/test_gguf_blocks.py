"""Block formats of GGUF against the reference implementation, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from weft.weights import gguf_blocks
from weft.weights.gguf_header import BLOCK_TYPES

QUANTIZABLE = ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
# Where the float16 numbers of a block lie (bytes): random bytes are valid blocks but for scales that are infinite or NaN.
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
}  # fmt: skip


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Blocks in which every bit is random but the exponents of scales."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[Type[name]][1]), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[:, at : at + 2] = (rng.standard_normal((count, 1)) * 0.01).astype(np.float16).view(np.uint8)
    return blocks


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    return gguf_blocks.DECODERS[name](torch.from_numpy(blocks.copy())).numpy()


def test_the_table_of_types_is_ggmls():
    assert {number: (t.name, t.elements, t.num_bytes) for number, t in BLOCK_TYPES.items()} == {
        int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items() if int(kind) in BLOCK_TYPES
    }
    assert gguf_blocks.DECODERS.keys() <= {t.name for t in BLOCK_TYPES.values()}


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_quantised_data_decodes_as_the_reference_does(name):
    values = (np.random.default_rng(1).standard_normal((37, 96)) * np.geomspace(1e-6, 1e3, 37)[:, None]).astype(np.float32)
    stored = gguf.quants.quantize(values, Type[name])
    expected = gguf.quants.dequantize(stored, Type[name])
    got = decode(name, stored.reshape(-1, gguf.GGML_QUANT_SIZES[Type[name]][1])).reshape(values.shape)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert not np.array_equal(got, values)


@pytest.mark.parametrize("name", sorted(HALVES))
def test_random_blocks_decode_as_the_reference_does(name):
    blocks = random_blocks(name, 301)
    expected = gguf.quants.dequantize(blocks, Type[name])
    got = decode(name, blocks)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", sorted(HALVES))
def test_every_byte_of_a_block_matters(name):
    """The negative control: a change of any one byte is seen."""
    block = random_blocks(name, 1, seed=3)
    before = decode(name, block)
    for at in range(block.shape[1]):
        changed = block.copy()
        changed[0, at] ^= 0x11
        assert not np.array_equal(decode(name, changed), before), f"byte {at} of {name} is not read"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_floats(dtype):
    values = np.array([[0.0, -0.0, 1.5, -2.25e-5, 65504, np.inf, -np.inf]], dtype=dtype)
    got = decode({np.float32: "F32", np.float16: "F16"}[dtype], values.view(np.uint8))
    np.testing.assert_array_equal(got.view(np.uint32), values.astype(np.float32).view(np.uint32))


def test_q8_0_quantises_as_the_reference_does():
    rng = np.random.default_rng(5)
    values = (rng.standard_normal((500, 32)) * np.geomspace(1e-4, 1e4, 500)[:, None]).astype(np.float32)
    values[7] = 0
    values[8] = np.arange(32) - 15.5  # the largest is a half: exact ties at many multiples
    values[9] = np.linspace(-127, 127, 32).round() + 0.5
    expected = gguf.quants.quantize(values, Type.Q8_0)
    got = gguf_blocks.quantize_q8_0(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(got, expected)
    even = torch.from_numpy(values).div(gguf_blocks.half(torch.from_numpy(got), 0)).round().to(torch.int8).numpy()
    assert not np.array_equal(even.view(np.uint8), got[:, 2:]), "rounding halves to even would have passed as well"


def test_q8_0_survives_numbers_too_small_for_a_scale():
    tiny = torch.full((1, 32), 1e-44)
    assert torch.equal(gguf_blocks.DECODERS["Q8_0"](gguf_blocks.quantize_q8_0(tiny)), torch.zeros(1, 32))
