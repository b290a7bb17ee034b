"""GGUF files whose matrices are kept as stored: the same codes and scales, so bit for bit what the dequantised file holds."""

import pytest
import torch

from weft import kernels
from weft.errors import UserError
from weft.nn import build
from weft.nn.packed import PackedWeight
from weft.quant import Reference
from weft.spec import model_spec
from weft.tokenizer import load_tokenizer
from weft.weights.export import export
from weft.weights.gguf import read_gguf
from weft.weights.gguf_blocks import half
from weft.weights.gguf_write import TypedValue, write_gguf
from weft.weights.hub import find_model
from weft.weights.load import load_weights, open_checkpoint
from weft.weights.save import save_model

LAYER = {
    "repeat": 2,
    "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}},
    "channel": {"type": "gated", "hidden": 96},
}
SPEC = {"vocab": 45, "dim": 64, "context": 64, "init_std": 0.15, "norm": {"type": "rms"}, "layers": [LAYER], "tie_embeddings": False}
PACKED_PER_LAYER = ("mixer.qkv.weight", "mixer.out.weight", "channel.gate_up.weight", "channel.down.weight")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    model = build(model_spec({**SPEC, "tie_embeddings": request.param}), seed=3)
    return save_model(model, tmp_path_factory.mktemp("llama") / "model")


def opened(path):
    """The file as it is kept, the same file dequantised, and the packed weights by name."""
    checkpoint = open_checkpoint(path)
    kept = load_weights(checkpoint, dtype=torch.float32, packed=True)
    return kept, load_weights(checkpoint, dtype=torch.float32), packed_of(kept)


def packed_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def rewritten(source, target, types):
    """The file again with some tensors in other types."""
    file = read_gguf(source)
    metadata = {key: TypedValue(file.value_types[key], value) for key, value in file.metadata.items()}
    rows = [(name, info.shape, types.get(name, info.type), lambda name=name: file.read(name)) for name, info in file.tensors.items()]
    write_gguf(target, metadata, rows)
    return target


def test_matrices_are_the_stored_ones_bit_for_bit(folder, tmp_path):
    export(folder, "gguf", tmp_path / "m.gguf", "q8_0")
    kept, plain, packed = opened(tmp_path / "m.gguf")
    wanted = dict(plain.named_parameters())
    assert {f"blocks.{i}.{name}" for i in range(2) for name in PACKED_PER_LAYER} <= set(packed)
    assert "embed.weight" in packed
    assert ("head.weight" in packed) == (not kept.spec.tie_embeddings)
    for name, module in packed.items():
        assert torch.equal(module.dequantise(), wanted[name]), name
    for name, parameter in kept.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert set(packed) | {name for name, _ in kept.named_parameters()} == set(wanted)
    qkv = packed["blocks.0.mixer.qkv.weight"]
    assert not torch.equal(qkv.dequantise(), wanted["blocks.1.mixer.qkv.weight"]), "control: another layer is another matrix"


def test_codes_and_scales_are_the_files_own(folder, tmp_path):
    export(folder, "gguf", tmp_path / "m.gguf", "q8_0")
    _, _, packed = opened(tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")

    def stored(name):
        blocks = file.raw(name).view(-1, 34)
        rows = file.info(name).shape[0]
        return (blocks[:, 2:].view(torch.int8) ^ -128).view(torch.uint8).reshape(rows, -1), half(blocks, 0).half().view(rows, -1)

    codes, scale, minimum = packed["blocks.1.mixer.qkv.weight"].unpack()
    assert minimum is None
    q, k, v = (stored(f"blk.1.attn_{which}.weight") for which in "qkv")
    for part, own in ((0, codes), (1, scale)):
        assert torch.equal(own[96:], v[part])
        for rows, heads, of_file in ((own[:64], 4, q[part]), (own[64:96], 2, k[part])):
            pairs = of_file.view(heads, 8, 2, -1)  # neighbours in the file, half a head apart with us
            assert torch.equal(rows.view(heads, 2, 8, -1), pairs.transpose(1, 2))
            assert not torch.equal(rows, of_file), "control: rows in the file's order are others"


def test_the_product_is_that_of_the_dequantised_model(folder, tmp_path):
    export(folder, "gguf", tmp_path / "m.gguf", "q8_0")
    kept, plain, packed = opened(tmp_path / "m.gguf")
    tokens = torch.arange(37)[None] % 45

    def distance():
        with torch.no_grad():
            got, want = kept(tokens).logits, plain(tokens).logits
        return ((got - want).abs().max() / want.abs().max()).item()

    assert distance() < 3e-4
    packed["blocks.0.channel.down.weight"].scale[0, 0] *= 2
    assert distance() > 3e-3, "control: sixteen doubled scales show"


@pytest.mark.parametrize("kind", ["f16", "f32", "bf16"])
def test_float_files_are_not_packed(folder, tmp_path, kind):
    export(folder, "gguf", tmp_path / "m.gguf", kind)
    assert open_checkpoint(tmp_path / "m.gguf").quant is None
    assert not opened(tmp_path / "m.gguf")[2]


def test_a_file_of_several_kinds_is_dequantised(folder, tmp_path):
    export(folder, "gguf", tmp_path / "m.gguf", "q8_0")
    mixed = rewritten(tmp_path / "m.gguf", tmp_path / "mixed.gguf", {"blk.1.ffn_down.weight": "F16"})
    assert open_checkpoint(tmp_path / "m.gguf").quant is not None
    assert open_checkpoint(mixed).quant is None
    kept, plain, packed = opened(mixed)
    assert not packed
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), plain.parameters(), strict=True))


def test_a_table_in_float_stays_so_beside_packed_layers(folder, tmp_path):
    export(folder, "gguf", tmp_path / "m.gguf", "q8_0")
    floats = dict.fromkeys(("token_embd.weight", "output.weight"), "F16")
    kept, plain, packed = opened(rewritten(tmp_path / "m.gguf", tmp_path / "table.gguf", floats))
    assert kept.spec.quant is not None
    assert kept.spec.quant.table == "float"
    assert len(packed) == 8
    assert torch.equal(kept.embed.weight, plain.embed.weight)
    assert kept.embed.weight.dtype == torch.float32


# The published Q4_1 file.

TEXT = (
    "The river rose for three days, and on the fourth it stood at the doors of the mill. Nobody in the village had seen it so high. "
    "The miller carried his books to the loft, then the flour, and last of all the cat, which had no wish to go.\n\n"
    "def merge(left, right):\n    result = []\n    while left and right:\n        source = left if left[0] <= right[0] else right\n"
    "        result.append(source.pop(0))\n    return result + left + right\n"
)


@pytest.fixture(scope="module")
def published():
    try:
        path = find_model("smollm2-135m")
    except UserError:
        pytest.skip("smollm2-135m has not been pulled: weft pull smollm2-135m")
    kept, plain, packed = opened(path)
    return kept, Reference(plain, load_tokenizer(path).encode(TEXT), len(TEXT.encode())), packed


def test_the_published_file_takes_its_own_size(published):
    kept, _, packed = published
    assert kept.spec.quant is not None
    assert (kept.spec.quant.type, kept.spec.quant.minimum) == ("int4", True)
    assert len(packed) == 4 * 30 + 1
    total = sum(module.num_bytes for module in packed.values()) + sum(p.numel() * p.element_size() for p in kept.parameters())
    assert total == pytest.approx(96.6e6, rel=1e-3)


def test_the_published_file_predicts_as_dequantised(published):
    kept, reference, packed = published
    if not kernels.available():
        pytest.skip("no kernels here: the product is that of the dequantised matrix")
    drift = reference.drift(kept)
    assert drift.kl < 2e-3
    assert drift.bits_per_byte == pytest.approx(drift.original_bits_per_byte, abs=1e-3)
    scale = packed["blocks.3.mixer.qkv.weight"].scale
    kept_aside = scale.clone()
    scale[0, 0, 0] *= 2
    one = reference.drift(kept).kl
    scale.mul_(2)
    many = reference.drift(kept).kl
    scale.copy_(kept_aside)
    print(f"KL {drift.kl:.2g}; one scale doubled {one:.2g}, all of a matrix {many:.2g}")
    assert one > 10 * drift.kl, "control: one scale of 32 weights"
    assert many > 2e-3, "control: a matrix"
