"""Model folders in Hugging Face layout: both ways with the safetensors library, damage refused, and loading that needs little memory."""

import json
import pickle
import random
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft.errors import UserError
from weft.weights import pieces
from weft.weights.files import TensorFiles, write_safetensors
from weft.weights.gguf_write import write_gguf
from weft.weights.layout import INDEX, SINGLE
from weft.weights.safetensors_header import read_safetensors_header


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, torch.Tensor] = {f"layer.{i}.weight": torch.randn(5 + i, 7, generator=generator) for i in range(6)}
    floats = {"half": torch.float16, "brain": torch.bfloat16, "double": torch.float64, "eight": torch.float8_e4m3fn}
    values |= {name: torch.randn(2, 3, 4, generator=generator).to(dtype) for name, dtype in floats.items()}
    values |= {"ids": torch.arange(11), "flags": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    return values | {"naïve.名": torch.ones(1)}


def assert_same(files: TensorFiles, expected: dict[str, torch.Tensor]) -> None:
    assert set(files.names) == set(expected)
    for name, value in expected.items():
        assert files.shape(name) == tuple(value.shape)
        assert files.dtype(name) == value.dtype
        got = files.read(name)
        assert got.dtype == value.dtype
        assert torch.equal(got.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name


def test_what_the_library_writes_is_read(tmp_path):
    save_file(tensors(), tmp_path / SINGLE)
    assert_same(TensorFiles(tmp_path), tensors() | load_file(tmp_path / SINGLE))
    assert_same(TensorFiles(tmp_path / SINGLE), load_file(tmp_path / SINGLE))
    assert not torch.equal(TensorFiles(tmp_path).read("layer.0.weight"), tensors(seed=1)["layer.0.weight"])


def test_the_library_reads_what_is_written(tmp_path):
    values = tensors()
    assert [path.name for path in write_safetensors(tmp_path, values.items())] == [SINGLE]
    loaded = load_file(tmp_path / SINGLE)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
    assert read_safetensors_header(tmp_path / SINGLE)[1] == {"format": "pt"}


def test_shards_both_ways(tmp_path):
    values = tensors()
    paths = write_safetensors(tmp_path, values.items(), max_shard_bytes=400)
    assert len(paths) > 3
    assert paths[-1].name == INDEX
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    merged = {name: load_file(tmp_path / shard)[name] for name, shard in index["weight_map"].items()}
    assert merged.keys() == values.keys()
    assert_same(TensorFiles(tmp_path), values)
    assert TensorFiles(tmp_path).num_bytes() == index["metadata"]["total_size"]
    for path in paths[:-1]:
        header = read_safetensors_header(path)[0]
        assert sum(tensor.num_bytes for tensor in header.values()) <= 400 or len(header) == 1


def test_a_later_save_replaces_an_earlier_one(tmp_path):
    write_safetensors(tmp_path, tensors(0).items(), max_shard_bytes=400)
    write_safetensors(tmp_path, tensors(1).items())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert torch.equal(TensorFiles(tmp_path).read("layer.0.weight"), tensors(1)["layer.0.weight"])
    write_safetensors(tmp_path, tensors(2).items(), max_shard_bytes=700)
    assert torch.equal(TensorFiles(tmp_path).read("layer.0.weight"), tensors(2)["layer.0.weight"])
    assert not (tmp_path / SINGLE).exists()


def test_rounding_as_it_is_written_and_as_it_is_read(tmp_path):
    values = tensors()
    write_safetensors(tmp_path, values.items(), dtype=torch.bfloat16)
    files = TensorFiles(tmp_path)
    assert files.dtype("layer.0.weight") == torch.bfloat16
    assert files.dtype("ids") == torch.int64
    assert torch.equal(files.read("double"), values["double"].bfloat16())
    assert torch.equal(files.read("double", dtype=torch.float32), values["double"].bfloat16().float())


def test_views_of_one_memory_and_strided_tensors(tmp_path):
    fused = torch.randn(9, 4)
    stored = {"q": fused[:3], "k": fused[3:6], "v": fused[6:], "all": fused, "t": fused.t(), "p": torch.nn.Parameter(fused)}
    write_safetensors(tmp_path, stored.items())
    for name, value in stored.items():
        assert torch.equal(TensorFiles(tmp_path).read(name), value)


@pytest.mark.parametrize("piece", [1, 5, 64])
def test_reading_into_any_layout_and_dtype(tmp_path, monkeypatch, piece):
    value = torch.randn(3, 13, 7)
    write_safetensors(tmp_path, [("w", value), ("m", value[0]), ("s", torch.tensor(3.5))])
    monkeypatch.setattr(pieces, "PIECE", piece)
    files = TensorFiles(tmp_path)
    for out in (torch.zeros(3, 13, 7), torch.zeros(7, 13, 3).permute(2, 1, 0), torch.zeros(6, 13, 7)[::2], torch.nn.Parameter(value * 0)):
        files.read_into("w", out)
        assert torch.equal(out, value)
    transposed = torch.zeros(7, 13)
    files.read_into("m", transposed.t())
    assert torch.equal(transposed, value[0].t())
    half = torch.zeros(13, 7).half()
    files.read_into("m", half)
    assert torch.equal(half, value[0].half())
    scalar = torch.zeros((), dtype=torch.float64)
    files.read_into("s", scalar)
    assert scalar == 3.5


def test_an_interrupted_save_changes_nothing(tmp_path):
    write_safetensors(tmp_path, tensors(0).items())

    def stopping():
        yield from list(tensors(1).items())[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path, stopping(), max_shard_bytes=200)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert torch.equal(TensorFiles(tmp_path).read("layer.0.weight"), tensors(0)["layer.0.weight"])


# Damage


def refused(path, match: str = "weights|damaged") -> None:
    with pytest.raises(UserError, match=match) as error:
        TensorFiles(path)
    assert str(error.value).endswith(".")


def test_every_cut_is_noticed(tmp_path):
    save_file(tensors(), tmp_path / "whole.safetensors")
    data, cut = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    for length in [*range(0, 40), *range(40, len(data), 31), len(data) - 1]:
        cut.write_bytes(data[:length])
        refused(cut, "cut short or damaged")
    cut.write_bytes(data + b"\0")
    refused(cut, "cut short or damaged")
    cut.write_bytes(data)
    assert TensorFiles(cut).names


def test_flipped_bytes_never_do_worse_than_a_sentence(tmp_path):
    save_file(tensors(), tmp_path / "whole.safetensors")
    data, broken = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "broken.safetensors"
    end = 8 + struct.unpack("<Q", data[:8])[0]
    rng, refusals = random.Random(0), 0
    for _ in range(500):
        changed = bytearray(data)
        changed[rng.randrange(end)] = rng.randrange(256)
        broken.write_bytes(changed)
        try:
            files = TensorFiles(broken)
            for name in files.names:
                files.read(name)
        except UserError:
            refusals += 1
    assert refusals > 200


def entry(**changes) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{]", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        ({"a": 3}, "malformed"),
        ({"a": entry(shape="ab")}, "malformed"),
        ({"a": entry(shape=[-2])}, "malformed"),
        ({"a": entry(shape=[True, 2])}, "malformed"),
        ({"a": entry(shape=[2.0])}, "malformed"),
        ({"a": entry(data_offsets=[0, 8, 9])}, "malformed"),
        ({"a": entry(shape=[2**62, 2**62])}, "does not have"),
        ({"a": entry(data_offsets=[2**62, 2**62 + 8])}, "does not begin"),
        ({"a": entry(dtype="F4")}, "dtype 'F4'"),
        ({"a": entry(dtype=[])}, "dtype"),
        ({"a": entry(), "b": entry()}, "does not begin"),
        ({"__metadata__": 3}, "metadata is not"),
    ],
)
def test_hostile_headers(tmp_path, header, message):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + b"\0" * 8)
    refused(path, message)
    path.write_bytes(struct.pack("<Q", 2**62) + data)
    refused(path, "claims 4611686018427387904 bytes")


def test_indexes_are_checked(tmp_path):
    write_safetensors(tmp_path, tensors().items(), max_shard_bytes=400)
    good = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(good["weight_map"].values()))

    def index(weight_map) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    outside = tmp_path.parent / "outside.safetensors"
    save_file({"ids": torch.zeros(1)}, outside)
    for path in ("../outside.safetensors", str(outside), "a/../../outside.safetensors", "..\\outside.safetensors", "x.bin", 3, None, ""):
        index(good["weight_map"] | {"ids": path})
        refused(tmp_path, "only .safetensors files beside the index")
    index(good["weight_map"] | {"absent": shards[0]})
    refused(tmp_path, f"'absent' is not in {shards[0]}")
    (tmp_path / INDEX).write_text('{"weight_map": [')
    refused(tmp_path, "no 'weight_map'")
    (tmp_path / INDEX).write_text("[]")
    refused(tmp_path, "no 'weight_map'")
    index(good["weight_map"])
    assert_same(TensorFiles(tmp_path), tensors())
    (tmp_path / shards[1]).unlink()
    refused(tmp_path, f"lacks {shards[1]}")


def test_folders_without_weights(tmp_path):
    refused(tmp_path, "holds no weights")
    refused(tmp_path / "absent", "there is no folder")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "not a file of weights")


def test_a_wrong_name_offers_the_nearest(tmp_path):
    write_safetensors(tmp_path, tensors().items())
    with pytest.raises(UserError, match=r"Did you mean 'layer\.1\.weight'"):
        TensorFiles(tmp_path).read("layer.1.wieght")


# Torch's own files


class Launcher:
    def __reduce__(self):
        return (print, ("code out of a file was run",))


def test_torch_files_of_plain_tensors(tmp_path):
    values = tensors()
    torch.save(values, tmp_path / "pytorch_model.bin")
    assert_same(TensorFiles(tmp_path), values)
    out = torch.zeros(2, 3, 4)
    TensorFiles(tmp_path).read_into("brain", out)
    assert torch.equal(out, values["brain"].float())
    del values["eight"]  # torch itself cannot read float8 out of its old format
    torch.save(values, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(TensorFiles(tmp_path / "old.pt"), values)
    write_safetensors(tmp_path, [("only", torch.ones(1))])
    assert TensorFiles(tmp_path).names == ["only"]


def test_torch_files_with_code_are_refused(tmp_path, capsys):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1), "b": Launcher()}, path)
    refused(tmp_path, "weights-only loader refuses")
    path.write_bytes(pickle.dumps({"a": Launcher()}, protocol=2))
    refused(tmp_path, "weights-only loader refuses")
    assert capsys.readouterr().out == ""
    pickle.loads(path.read_bytes())  # noqa: S301 (the negative control: plain pickle does run it)
    assert "was run" in capsys.readouterr().out


def test_torch_files_that_are_not_tables_or_are_cut(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": {"a": torch.ones(1)}}, path)
    refused(tmp_path, "not a plain table")
    torch.save(tensors(), path)
    data = path.read_bytes()
    for length in (0, 3, 100, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:length])
        refused(tmp_path)


# Memory

LOADER = """
import resource, sys, torch
from weft.weights.files import TensorFiles
from weft.weights.gguf import read_gguf
kind, path, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
now = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
source = read_gguf(path) if kind == "gguf" else TensorFiles(path)
shapes = {n: i.shape for n, i in source.tensors.items()} if kind == "gguf" else {n: source.shape(n) for n in source.names}
model = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
before = now()
if kind == "safe_open":
    from safetensors import safe_open
    with safe_open(path + "/model.safetensors", framework="pt") as file:
        for name, tensor in model.items():
            tensor.copy_(file.get_tensor(name))
else:
    for name, tensor in model.items():
        source.read_into(name, tensor)
# Not getrusage: its peak outlives exec, and so counts the process that started this one.
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print((peak - before) / sum(tensor.nbytes for tensor in model.values()))
"""


def peak_ratio(kind: str, path, dtype: str) -> float:
    """Peak memory above the imports over the bytes of the model, loading into tensors that exist, in a process of its own."""
    command = [sys.executable, "-c", LOADER, kind, str(path), dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """227 MB of weights, half of them one embedding, in one file and in shards."""
    folder = tmp_path_factory.mktemp("large")
    values = {"embedding": torch.rand(28_000, 1024)} | {f"layer.{i}": torch.rand(2200, 1280) for i in range(10)}
    write_safetensors(folder / "one", values.items())
    write_safetensors(folder / "shards", values.items(), max_shard_bytes=60e6)
    assert (folder / "one" / SINGLE).stat().st_size > 200e6
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_streams(large):
    for ratio in (peak_ratio("files", large / "one", "float32"), peak_ratio("files", large / "shards", "bfloat16")):
        assert 0.9 < ratio <= 1.2
    assert peak_ratio("safe_open", large / "one", "float32") > 1.5, "a mapped file would have passed as well: the test measures nothing"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dequantising_streams(large):
    files = TensorFiles(large / "one")
    path = large / "q8_0.gguf"
    write_gguf(path, {}, [(name, files.shape(name), "Q8_0", lambda name=name: files.read(name)) for name in files.names])
    assert 0.9 < peak_ratio("gguf", path, "float32") <= 1.2
    assert 0.9 < peak_ratio("gguf", path, "bfloat16") <= 1.2
