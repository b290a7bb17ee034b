"""Writing GGUF: the reference package reads it back, and nothing half-written is ever left."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from weft.errors import UserError
from weft.weights.gguf import read_gguf
from weft.weights.gguf_write import TypedValue, write_gguf

METADATA = {
    "general.architecture": "llama", "llama.block_count": 3, "negative": -5, "large": 2**40, "ratio": 0.5,
    "exact": TypedValue("float64", 0.1), "small": TypedValue("uint8", 7), "flag": False, "tokens": ["<s>", "é", "🙂", ""],
    "types": [3, 1, 1], "scores": [0.0, -1.5], "flags": [True, False], "nested": [[1, 2], [3]], "empty": TypedValue("array[string]", []),
}  # fmt: skip


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"odd": (3, 7), "rows": (5, 64), "cube": (2, 3, 32), "line": (33,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fitting(kind: str, shape: tuple[int, ...]) -> str:
    return kind if kind != "Q8_0" or shape[-1] % 32 == 0 else "F16"


def entries(values: dict[str, torch.Tensor], kind: str) -> list:
    return [(name, value.shape, fitting(kind, value.shape), lambda v=value: v) for name, value in values.items()]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("alignment", [32, 64])
def test_the_reference_reads_it_back(tmp_path, kind, alignment):
    path, values = tmp_path / "f.gguf", tensors()
    write_gguf(path, METADATA | {"general.alignment": alignment}, entries(values, kind))
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        expected = value.value if isinstance(value, TypedValue) else value
        # The reference gives nested lists back as one.
        assert reader.fields[key].contents() == ([1, 2, 3] if key == "nested" else expected), key
    assert reader.alignment == alignment
    assert [tensor.name for tensor in reader.tensors] == list(values)
    for tensor in reader.tensors:
        value = values[tensor.name].numpy()
        stored = Type[fitting(kind, value.shape)]
        assert tensor.tensor_type == stored
        expected = gguf.quants.quantize(value, stored)
        np.testing.assert_array_equal(tensor.data.view(np.uint8).reshape(-1), expected.view(np.uint8).reshape(-1))
        assert tensor.data_offset % alignment == 0
    assert path.stat().st_size % alignment == 0


def test_weft_reads_it_back(tmp_path):
    values = tensors()
    write_gguf(tmp_path / "f.gguf", METADATA, entries(values, "F32"))
    file = read_gguf(tmp_path / "f.gguf")
    assert file.metadata == {key: value.value if isinstance(value, TypedValue) else value for key, value in METADATA.items()}
    assert [file.value_types[key] for key in ("llama.block_count", "negative", "large", "ratio", "types", "exact")] == [
        "uint32", "int32", "uint64", "float32", "array[int32]", "float64",
    ]  # fmt: skip
    for name, value in values.items():
        assert torch.equal(file.read(name), value)
    assert not torch.equal(file.read("rows"), tensors(seed=1)["rows"])


def test_metadata_and_types_survive_a_second_writing(tmp_path):
    values = tensors()
    write_gguf(tmp_path / "a.gguf", METADATA, entries(values, "F16"))
    first = read_gguf(tmp_path / "a.gguf")
    typed = {key: TypedValue(first.value_types[key], value) for key, value in first.metadata.items()}
    write_gguf(tmp_path / "b.gguf", typed, [(n, i.shape, i.type, lambda n=n: first.read(n)) for n, i in first.tensors.items()])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_strided_and_half_precision_tensors(tmp_path):
    value = torch.randn(64, 5).bfloat16()
    write_gguf(tmp_path / "f.gguf", {}, [("t", (5, 64), "BF16", lambda: value.t()), ("u", (5, 64), "Q8_0", lambda: value.t())])
    file = read_gguf(tmp_path / "f.gguf")
    assert torch.equal(file.read("t", dtype=torch.bfloat16), value.t())
    assert (file.read("u") - value.t()).abs().max() < value.abs().max() / 100


def test_one_tensor_is_asked_for_at_a_time_and_progress_is_told(tmp_path):
    asked, told = [], []

    def load(name):
        asked.append(name)
        return torch.zeros(4, 32)

    items = [(name, (4, 32), "F16", lambda name=name: load(name)) for name in "abc"]
    write_gguf(tmp_path / "f.gguf", {}, items, progress=lambda done, total: told.append((done, total, len(asked))))
    assert told == [(256, 768, 1), (512, 768, 2), (768, 768, 3)]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("t", (3, 33), "Q8_0", lambda: torch.zeros(3, 33))], "multiples of 32"),
        ([("t", (3, 32), "Q4_K", lambda: torch.zeros(3, 32))], "unknown GGUF type to write 'Q4_K'"),
        ([("t", (1, 32), "F16", lambda: torch.full((1, 32), 1e5))], "beyond F16"),
        ([("t", (1, 32), "Q8_0", lambda: torch.full((1, 32), torch.nan))], "not finite"),
        ([("t", (), "F32", lambda: torch.zeros(()))], "0 axes"),
        ([("t", (32,), "F32", lambda: torch.zeros(32))] * 2, "twice"),
    ],
)
def test_refusals_leave_the_old_file(tmp_path, items, message):
    path = tmp_path / "f.gguf"
    path.write_bytes(b"as it was")
    with pytest.raises(UserError, match=message):
        write_gguf(path, METADATA, items)
    assert path.read_bytes() == b"as it was"
    assert [p.name for p in tmp_path.iterdir()] == ["f.gguf"]


@pytest.mark.parametrize("value", [None, [], [1, "a"], {"a": 1}, TypedValue("uint8", 300), TypedValue("uint9", 3), 2**70])
def test_metadata_that_gguf_cannot_hold(tmp_path, value):
    with pytest.raises(UserError, match="metadata"):
        write_gguf(tmp_path / "f.gguf", {"key": value}, [])
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "f.gguf", {}, [("a", (32,), "F32", lambda: torch.zeros(32)), ("b", (32,), "F32", stop)])
    assert not list(tmp_path.iterdir())
