"""Reading GGUF files: against files the reference package wrote, and against damage of every kind."""

import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from paths import SHARED
from weft.errors import UserError
from weft.weights import gguf_header, pieces
from weft.weights.gguf import read_gguf

TOKENS = ["<s>", "", "é", "日本", "a b", "\u0120the", "🙂"] * 9


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"a": (5, 64), "b": (7,), "c": (2, 3, 32)}.items()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory, arrays):
    """A small file with a value of every type and a tensor of several storage types, by the reference writer."""
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 🙂")
    writer.add_array("ints", [3, -1, 2])
    writer.add_array("floats", [0.5, -1.25])
    writer.add_array("flags", [True, False])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_token_list(TOKENS)
    for kind in (Type.F32, Type.F16, Type.Q8_0, Type.Q4_1):
        stored = gguf.quants.quantize(arrays["a"], kind)
        writer.add_tensor(f"a.{kind.name}", stored, raw_dtype=kind)
    writer.add_tensor("b", arrays["b"])
    writer.add_tensor("c", gguf.quants.quantize(arrays["c"], Type.Q5_0), raw_dtype=Type.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata(sample):
    file = read_gguf(sample)
    expected = {
        "general.architecture": "llama", "u8": 200, "i8": -100, "u16": 60000, "i16": -30000, "u32": 4_000_000_000, "i32": -2_000_000_000,
        "u64": 2**63 + 1, "i64": -(2**62), "f32": 0.5, "f64": 0.1, "yes": True, "text": "naïve 🙂", "ints": [3, -1, 2],
        "floats": [0.5, -1.25], "flags": [True, False], "nested": [[1, 2], [3]], "tokenizer.ggml.tokens": TOKENS,
    }  # fmt: skip
    assert {key: file.metadata[key] for key in expected} == expected
    assert file.value_types["u16"] == "uint16"
    assert file.value_types["tokenizer.ggml.tokens"] == "array[string]"
    assert file.metadata["yes"] is True
    assert file.version == 3


def test_tensors(sample, arrays):
    file = read_gguf(sample)
    assert file.tensors["c"].shape == (2, 3, 32)
    assert file.tensors["a.Q4_1"].num_bytes == 5 * 2 * 20
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(sample).tensors}
    assert list(file.tensors) == list(reference)
    for name, tensor in reference.items():
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.read(name).numpy(), expected)
        np.testing.assert_array_equal(file.raw(name).numpy().reshape(-1), tensor.data.view(np.uint8).reshape(-1))
    np.testing.assert_array_equal(file.read("b").numpy(), arrays["b"])


def test_reading_into_what_is_there(sample):
    file = read_gguf(sample)
    expected = file.read("a.Q4_1")
    transposed = torch.full((64, 5), torch.nan).t()
    assert not transposed.is_contiguous()
    file.read_into("a.Q4_1", transposed)
    assert torch.equal(transposed, expected)
    parameter = torch.nn.Parameter(torch.zeros(5, 64, dtype=torch.bfloat16))
    file.read_into("a.Q4_1", parameter)
    assert torch.equal(parameter.detach(), expected.bfloat16())
    assert torch.equal(file.read("a.Q4_1", dtype=torch.float16), expected.half())
    part = torch.zeros(9, 64)
    file.read_into("a.Q4_1", part[2:7])
    assert torch.equal(part[2:7], expected)
    assert part[:2].abs().sum() == 0


@pytest.mark.parametrize("piece", [256, 512, 4096])
def test_the_size_of_pieces_changes_nothing(tmp_path, monkeypatch, piece):
    values = np.random.default_rng(2).standard_normal((3, 11, 768)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "llama")
    for name, array in {"whole": values, "row": values.reshape(-1)}.items():
        writer.add_tensor(name, gguf.quants.quantize(array, Type.Q4_0), raw_dtype=Type.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "f.gguf")
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, Type.Q4_0), Type.Q4_0))
    monkeypatch.setattr(pieces, "PIECE", piece)
    assert torch.equal(file.read("whole"), expected)
    assert torch.equal(file.read("row"), expected.view(-1))


def test_a_wrong_name_offers_the_nearest(sample):
    with pytest.raises(UserError, match=r"Did you mean 'a\.Q8_0'"):
        read_gguf(sample).read("a.Q8_1")


def test_importing_and_reading_a_header_never_imports_torch(sample):
    code = "import sys; from weft.weights.gguf import read_gguf; read_gguf(sys.argv[1]); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(sample)], check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.skipif(SHARED is None, reason="needs the data pack's vocabularies")
@pytest.mark.parametrize("name", ["phi-3", "bert-bge"])
def test_real_vocabularies(name):
    assert SHARED is not None
    path = SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf"
    reader, file = gguf.GGUFReader(path), read_gguf(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == field.contents(), key
    assert len(file.metadata["tokenizer.ggml.tokens"]) > 30_000


# Damage


def refused(path: Path) -> str:
    """The message with which the file is refused."""
    with pytest.raises(UserError) as error:
        read_gguf(path)
    message = str(error.value)
    assert str(path) in message
    assert message.endswith(".")
    return message


def test_every_cut_is_noticed(sample, tmp_path):
    data = sample.read_bytes()
    # The padding after the last tensor may go; nothing else may.
    end = max(info.offset + info.num_bytes for info in read_gguf(sample).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 200), *range(200, end, 97), end - 1]:
        cut.write_bytes(data[:length])
        refused(cut)
    cut.write_bytes(data[:end])
    assert read_gguf(cut).tensors.keys() == read_gguf(sample).tensors.keys()


def test_flipped_bytes_never_do_worse_than_a_sentence(sample, tmp_path):
    data = sample.read_bytes()
    start = min(info.offset for info in read_gguf(sample).tensors.values())
    rng, broken, refusals = random.Random(0), tmp_path / "broken.gguf", 0
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 3])):
            changed[rng.randrange(start)] = rng.randrange(256)
        broken.write_bytes(changed)
        try:
            file = read_gguf(broken)
            for name in file.tensors:
                file.read(name)
        except UserError:
            refusals += 1
    assert refusals > 100


def header(*values: bytes, tensors: int = 0, count: int | None = None, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, len(values) if count is None else count) + b"".join(values)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


HUGE = 2**62
HOSTILE = {
    "is not a GGUF file": header(magic=b"GGML"),
    "version 1": header(version=1),
    "big-endian": header(version=3 << 24),
    "claims 4611686018427387904 tensors": header(tensors=HUGE),
    "claims 4611686018427387904 metadata values": header(count=HUGE),
    "claims 4611686018427387904 strings": header(pair("k", 9, struct.pack("<IQ", 8, HUGE))),
    "claims 4611686018427387904 numbers": header(pair("k", 9, struct.pack("<IQ", 4, HUGE))),
    "claims 4611686018427387904 arrays": header(pair("k", 9, struct.pack("<IQ", 9, HUGE))),
    "the text of 'k' needs 4611686018427387904": header(pair("k", 8, struct.pack("<Q", HUGE))),
    "a string of 'k' needs 4611686018427387904": header(pair("k", 9, struct.pack("<IQQ", 8, 1, HUGE))),
    "nested over": header(pair("k", 9, struct.pack("<IQ", 9, 1) * 50)),
    "unknown type 77": header(pair("k", 77, b"")),
    "unknown element type 78": header(pair("k", 9, struct.pack("<IQ", 78, 0))),
    "appears twice": header(pair("k", 0, b"1"), pair("k", 0, b"2")),
    "not UTF-8": header(pair("k", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    "not a power of two": header(pair("general.alignment", 4, struct.pack("<I", 33))),
    "general.alignment is '32'": header(pair("general.alignment", 8, text("32"))),
    "0 axes": header(tensor("t", ()), tensors=1, count=0),
    "9 axes": header(tensor("t", (1,) * 9), tensors=1, count=0),
    "unknown type 99": header(tensor("t", (1,), kind=99), tensors=1, count=0),
    "multiples of 32": header(tensor("t", (33,), kind=8), tensors=1, count=0),
    "not aligned": header(tensor("t", (1,), offset=3), tensors=1, count=0),
    "the tensor 't' ends at byte": header(tensor("t", (HUGE, HUGE)), tensors=1, count=0),
    "the tensor 't' appears twice": header(tensor("t", (1,)), tensor("t", (1,)), tensors=2, count=0),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_headers(tmp_path, message):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[message] + b"\0" * 64)
    assert message in refused(path)


def test_a_header_may_not_be_endless(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 2**20)
    path = tmp_path / "long.gguf"
    path.write_bytes(header(pair("k", 8, struct.pack("<Q", 2**20) + b"x" * 2**20)))
    assert "over 1 MB" in refused(path)


def test_what_is_not_a_file(tmp_path):
    assert "there is no file" in refused(tmp_path / "absent.gguf")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "empty.gguf").touch()
    assert "is empty" in refused(tmp_path / "empty.gguf")


def test_a_type_without_a_decoder_is_refused_when_it_is_read(tmp_path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(header(tensor("t", (256,), kind=16), tensors=1, count=0).ljust(96, b"\0") + b"\0" * 66)
    file = read_gguf(path)
    with pytest.raises(UserError, match=r"stored as IQ2_XXS.*Q4_K"):
        file.read("t")


def test_a_file_cut_after_it_was_opened(sample, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(sample.read_bytes())
    file = read_gguf(path)
    path.write_bytes(sample.read_bytes()[: file.tensors["c"].offset + 5])
    with pytest.raises(UserError, match="before the tensor did"):
        file.read("c")
