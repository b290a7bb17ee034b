"""Pulling from a hub: a server on this machine stands for it, and the real client library talks to it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from local_hub import serving

from weft.errors import UserError
from weft.weights import hub, hub_download, model_cache
from weft.weights.files import TensorFiles, write_safetensors
from weft.weights.gguf import read_gguf
from weft.weights.gguf_write import write_gguf

REPO = "org/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of 2 MB in two shards."""
    path = tmp_path_factory.mktemp("model")
    write_safetensors(path, [("a", torch.rand(250_000)), ("b", torch.rand(250_000))], max_shard_bytes=1_000_000)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text('{"model": {}}')
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf"
    write_gguf(path, {"general.architecture": "llama"}, [("t", (4, 32), "Q8_0", lambda: torch.ones(4, 32))])
    return path


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "weft"))
    monkeypatch.delenv("WEFT_OFFLINE", raising=False)
    return tmp_path / "weft"


@pytest.fixture
def online(server, folder, monkeypatch):
    """The hub in order, with one repo, and this process allowed to talk to it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # The client keeps what it receives in memory up to this size (10 MB) before it writes: small, so that small files are cut too.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**15)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.repos = {REPO: {"main": {path.name: path.read_bytes() for path in folder.iterdir()}}}
    server.sent.clear()
    server.lies, server.gated = {}, set()
    server.down_after = server.bytes_per_s = None
    server.silent = False
    return server


@pytest.fixture
def unreachable(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def quiet_pull(name: str, **options) -> hub.Pulled:
    return hub.pull(name, note=lambda _: None, **options)


def names_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


# From the hub


def test_a_repo_is_pulled_whole_and_once(online, folder, cache):
    told = []
    online.repos[REPO]["main"] |= {
        "pytorch_model.bin": b"pickle",
        "model.fp16.safetensors": b"copy",
        "onnx/model.safetensors": b"x",
        "run.py": b"x",
    }
    online.repos[REPO]["main"][model_cache.MANIFEST] = b"not ours"
    model = quiet_pull(REPO, progress=lambda what, done, total: told.append((done, total)))
    assert model.path == cache / "models" / "org--tiny"
    assert names_of(model.path) == sorted([*names_of(folder), model_cache.MANIFEST])
    for path in folder.iterdir():
        assert (model.path / path.name).read_bytes() == path.read_bytes()
    assert model.source == f"hub:{REPO}"
    assert re.fullmatch("[0-9a-f]{40}", model.commit or "")
    assert told[-1] == (model.bytes, model.bytes)
    assert sum(online.sent.values()) == model.bytes
    assert hub.find_model(REPO) == model.path
    assert set(TensorFiles(hub.find_model(REPO)).names) == {"a", "b"}
    assert quiet_pull(REPO) == model
    assert sum(online.sent.values()) == model.bytes, "a second pull fetched something"


def test_a_cut_pull_goes_on_where_it_stopped(online, folder, cache):
    total = sum(path.stat().st_size for path in folder.iterdir())
    online.down_after = 1_400_000
    with pytest.raises(UserError, match=r"stopped at 0\.[1-9] of 1\.0 MB .*run the same command again"):
        quiet_pull(REPO)
    assert hub.list_models() == []
    assert names_of(cache / "models") == ["org--tiny.partial"]
    with pytest.raises(UserError, match=f"weft pull {REPO}"):
        hub.find_model(REPO)
    assert sum(online.sent.values()) > 1_000_000
    online.down_after = None
    model = quiet_pull(REPO)
    assert model_cache.damaged_files(model, hashes=True) == []
    assert names_of(cache / "models") == ["org--tiny"]
    assert sum(online.sent.values()) - total < 100_000, "the second run began again"


def test_a_killed_pull_goes_on_where_it_stopped(online, tmp_path, cache):
    """SIGKILL in the middle of a file, then the command line once more."""
    write_safetensors(tmp_path / "large", [("a", torch.rand(6_000_000))])
    online.repos[REPO]["main"] = {"model.safetensors": (tmp_path / "large" / "model.safetensors").read_bytes(), "config.json": b"{}"}
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": online.url, "WEFT_HOME": str(cache)}
    command = [sys.executable, "-c", "from weft.cli.main import main; main()", "pull", REPO, "--json"]
    online.bytes_per_s = 20e6
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(online.sent.values()) < 17e6 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hub.list_models() == []
    (part,) = (cache / "models" / "org--tiny.partial").glob("*.part")
    came = part.stat().st_size
    assert 10e6 < came < 24e6
    time.sleep(0.2)
    online.sent.clear()
    online.bytes_per_s = None
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert json.loads(output.splitlines()[-1])["path"] == str(cache / "models" / "org--tiny")
    (model,) = hub.list_models()
    assert model_cache.damaged_files(model, hashes=True) == []
    assert online.sent["model.safetensors"] == {file.path: file.bytes for file in model.files}["model.safetensors"] - came


def test_content_that_is_not_what_the_hub_publishes_is_never_used(online, folder):
    shard = next(path for path in folder.iterdir() if path.suffix == ".safetensors")
    wrong = bytearray(shard.read_bytes())
    wrong[-1] ^= 1
    online.lies = {shard.name: bytes(wrong)}
    with pytest.raises(UserError, match="other content than the hub publishes"):
        quiet_pull(REPO)
    assert online.sent[shard.name] == 2 * len(wrong), "it should be tried twice"
    assert hub.list_models() == []
    online.lies = {"config.json": b'{"model_type": "llamb"}'}
    with pytest.raises(UserError, match=r"'config\.json' .*other content"):
        quiet_pull(REPO)
    online.lies = {}
    assert quiet_pull(REPO).files


def test_a_damaged_half_from_an_earlier_run_is_fetched_again(online, folder, cache):
    online.down_after = 1_400_000
    with pytest.raises(UserError):
        quiet_pull(REPO)
    (part,) = (cache / "models" / "org--tiny.partial").glob("*.part")
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    online.down_after = None
    assert model_cache.damaged_files(quiet_pull(REPO), hashes=True) == []


def test_damage_in_the_cache_is_found_and_repaired(online):
    notes: list[str] = []
    model = quiet_pull(REPO)
    shard = sorted(model.path.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} .*Run `weft pull {REPO}` to repair"):
        hub.find_model(REPO)
    online.sent.clear()
    hub.pull(REPO, note=notes.append)
    assert shard.read_bytes() == data
    assert "is damaged" in notes[0]
    assert set(online.sent) == {shard.name}, "more than the damaged file came again"
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    hub.pull(REPO, note=notes.append)
    assert shard.read_bytes() != data, "the size is right: only --verify can see it"
    hub.pull(REPO, verify=True, note=notes.append)
    assert shard.read_bytes() == data
    (model.path / "config.json").unlink()
    hub.pull(REPO, note=notes.append)
    assert hub.find_model(REPO) == model.path


def test_a_name_that_is_taken_is_not_replaced(online, folder):
    online.repos["org/other"] = online.repos[REPO]
    model = quiet_pull(REPO, save_as="mine")
    with pytest.raises(UserError, match=f"already a model in the cache, from hub:{REPO}; choose another name"):
        quiet_pull("org/other", save_as="mine")
    assert quiet_pull(REPO, save_as="mine") == model


def test_a_folder_of_the_same_name_is_no_hindrance(online, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "org" / "tiny")
    assert quiet_pull(REPO).source == f"hub:{REPO}"
    assert quiet_pull(REPO, save_as="copy").source == f"path:{tmp_path / REPO}"


def test_another_revision_replaces_the_model(online):
    old = quiet_pull(REPO)
    online.repos[REPO]["v2"] = online.repos[REPO]["main"] | {"config.json": b'{"model_type": "new"}'}
    online.sent.clear()
    new = quiet_pull(REPO, revision="v2")
    assert (new.path / "config.json").read_text() == '{"model_type": "new"}'
    assert set(online.sent) == {"config.json"}, "what both revisions share came again"
    assert new.commit != old.commit
    assert quiet_pull(REPO, revision=new.commit) == new
    with pytest.raises(UserError, match="no revision 'v3'"):
        quiet_pull(REPO, revision="v3")
    assert hub.list_models() == [new]


def test_a_model_kept_under_another_name_is_repaired_from_where_it_came(online, folder):
    model = quiet_pull(REPO, save_as="tiny")
    (model.path / "config.json").write_text("damaged")
    assert (quiet_pull("tiny").path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    local = quiet_pull(str(folder), save_as="org/local")
    (local.path / "config.json").write_text("damaged")
    with pytest.raises(UserError, match=rf"config\.json of 'org/local' is damaged.*weft pull {folder} --name org/local"):
        quiet_pull("org/local")


def test_ggufs_of_a_repo_are_chosen_by_type(online, gguf_file):
    data = gguf_file.read_bytes()
    online.repos["org/quants"] = {"main": {"tiny-Q8_0.gguf": data, "tiny-Q4_K_M.gguf": data, "tiny.F16.gguf": data, "README.md": b"x"}}
    online.repos["org/single"] = {"main": {"only.gguf": data}}
    with pytest.raises(UserError, match=r"3 GGUF files; name one, as in org/quants:Q4_K_M"):
        quiet_pull("org/quants")
    with pytest.raises(UserError, match="0 GGUF files for 'Q5_K'"):
        quiet_pull("org/quants:Q5_K")
    model = quiet_pull("org/quants:q8_0")
    assert [file.path for file in model.files] == ["tiny-Q8_0.gguf"]
    assert hub.find_model("org/quants:q8_0") == model.path / "tiny-Q8_0.gguf"
    assert quiet_pull("org/quants:F16").path != model.path
    assert read_gguf(hub.find_model(quiet_pull("org/single").name)).tensors.keys() == {"t"}
    assert [m.name for m in hub.list_models()] == ["org/quants:F16", "org/quants:q8_0", "org/single"]


def test_repos_that_cannot_be_had(online):
    online.repos["org/pickles"] = {"main": {"pytorch_model.bin": b"x", "config.json": b"{}"}}
    online.repos["org/empty"] = {"main": {"README.md": b"x"}}
    online.gated.add("org/gated")
    for name, message in {
        "org/absent": "no repo 'org/absent', or it is private",
        "org/pickles": "only pickled weights",
        "org/empty": "no safetensors and no GGUF",
        "org/gated": "agree to a licence",
        "gpt22": "Did you mean 'gpt2'",
        "a/b/c": "there is no file or folder",
        "../up": "there is no file or folder",
        "-x": "cannot name a model",
    }.items():
        with pytest.raises(UserError, match=message):
            quiet_pull(name)
    assert hub.list_models() == []


def test_a_hub_that_falls_silent_is_given_up(online, monkeypatch):
    monkeypatch.setattr(hub_download, "ANSWER_TIMEOUT_S", 0.5)
    online.silent = True
    with pytest.raises(UserError, match="the model hub cannot be reached"):
        quiet_pull(REPO)


def test_a_hub_that_is_not_there(unreachable):
    with pytest.raises(UserError, match=r"cannot be reached \(.*\); check the network, or give a folder") as error:
        quiet_pull(REPO)
    assert "http" not in str(error.value)


# Offline


@pytest.mark.parametrize("variable", [None, "WEFT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_never_uses_the_network(online, monkeypatch, variable):
    monkeypatch.setattr(hub_download, "list_repo", lambda *_: pytest.fail("the network was used"))
    if variable:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match="is not in the cache, and --offline"):
        quiet_pull(REPO, offline=variable is None)
    monkeypatch.undo()


def test_offline_gives_what_is_here(online):
    model = quiet_pull(REPO)
    assert quiet_pull(REPO, offline=True, verify=True) == model
    sorted(model.path.glob("*.safetensors"))[0].write_bytes(b"cut")
    with pytest.raises(UserError, match="not in the cache whole"):
        quiet_pull(REPO, offline=True)
    assert model.path.is_dir()


# From this machine


def test_a_folder_is_kept_under_a_name(folder, cache):
    with pytest.raises(UserError, match=f"weft pull {folder} --name NAME"):
        quiet_pull(str(folder))
    (folder / "weights.bin").write_bytes(b"pickle")
    model = quiet_pull(str(folder), save_as="mine")
    (folder / "weights.bin").unlink()
    assert names_of(model.path) == sorted([*names_of(folder), model_cache.MANIFEST])
    assert hub.find_model("mine") == model.path
    assert model_cache.damaged_files(model, hashes=True) == []
    assert quiet_pull(f"file:{folder}", save_as="mine").date >= model.date
    assert [m.name for m in hub.list_models()] == ["mine"]


def test_a_gguf_is_kept_under_a_name(gguf_file):
    model = quiet_pull(str(gguf_file), save_as="small")
    assert hub.find_model("small") == model.path / gguf_file.name
    assert quiet_pull(str(gguf_file.parent), save_as="small2").files[0].path == gguf_file.name


def test_broken_models_of_this_machine_are_refused(folder, gguf_file, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:100])
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    torch.save({"a": torch.ones(1)}, pickled / "pytorch_model.bin")
    (tmp_path / "void").mkdir()
    for path, message in {broken: "cut short", cut: "cut short", pickled: "pickled weights", tmp_path / "void": "is not a model"}.items():
        with pytest.raises(UserError, match=message):
            quiet_pull(str(path), save_as="x")
    with pytest.raises(UserError, match="--revision belongs to repos"):
        quiet_pull(str(folder), save_as="x", revision="main")
    assert hub.list_models() == []


# Finding, listing, removing


def test_paths_are_taken_as_they_are(folder, gguf_file, tmp_path, monkeypatch):
    assert hub.find_model(folder) == folder
    assert hub.find_model(gguf_file) == gguf_file
    assert hub.find_model(gguf_file.parent) == gguf_file
    shutil.copy(gguf_file, tmp_path / "one.gguf")
    shutil.copy(gguf_file, tmp_path / "two.gguf")
    with pytest.raises(UserError, match=r"2 GGUF files; give one of them: one\.gguf, two\.gguf"):
        hub.find_model(tmp_path)
    with pytest.raises(UserError, match="there is no file or folder"):
        hub.find_model("./nowhere")


def test_a_folder_that_is_no_model_does_not_hide_a_pulled_one(folder, tmp_path, monkeypatch):
    model = quiet_pull(str(folder), save_as="mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert hub.find_model("mine") == model.path
    shutil.copytree(folder, tmp_path / "mine", dirs_exist_ok=True)
    assert hub.find_model("mine") == Path("mine")


def test_an_unknown_name_says_what_to_do(folder):
    quiet_pull(str(folder), save_as="my-model")
    for name, message in {
        "my-modle": "Did you mean 'my-model'",
        "gpt2": "Run `weft pull gpt2`",
        "org/name": "Run `weft pull org/name`",
        "smolm2-135m": "Did you mean 'smollm2-135m'",
    }.items():
        with pytest.raises(UserError, match=message):
            hub.find_model(name)


def test_the_list_shows_whole_models_only(folder, cache):
    assert hub.list_models() == []
    model = quiet_pull(str(folder), save_as="b")
    quiet_pull(str(folder), save_as="a")
    shutil.copytree(model.path, cache / "models" / "c.partial")
    (cache / "models" / "d").mkdir()
    (cache / "models" / "e").mkdir()
    (cache / "models" / "e" / model_cache.MANIFEST).write_text("{")
    shutil.copytree(model.path, cache / "models" / "f")  # a manifest that belongs to another folder
    assert [m.name for m in hub.list_models()] == ["a", "b"]
    manifest = json.loads((model.path / model_cache.MANIFEST).read_text())
    manifest["files"][0]["path"] = "../../../escape"
    (model.path / model_cache.MANIFEST).write_text(json.dumps(manifest))
    assert [m.name for m in hub.list_models()] == ["a"]


def test_removing(folder, cache, tmp_path):
    model = quiet_pull(str(folder), save_as="mine")
    (cache / "models" / "mine.partial").mkdir()
    (cache / "models" / "mine.partial" / "x.part").write_bytes(b"12345")
    outside = tmp_path / "outside"
    shutil.copytree(folder, outside)
    for name in (str(outside), "../outside", "..", ".", "", "mine.partial", "mine/../../outside", "/", "~"):
        with pytest.raises(UserError, match=r"is not the name of a pulled model"):
            hub.remove(name)
    with pytest.raises(UserError, match="Did you mean 'mine'"):
        hub.remove("mien")
    manifest_bytes = (model.path / model_cache.MANIFEST).stat().st_size
    assert hub.remove("mine") == model.bytes + manifest_bytes + 5
    assert hub.list_models() == []
    assert names_of(cache / "models") == []
    assert outside.is_dir()


def test_removing_a_link_leaves_what_it_points_to(folder, cache, tmp_path):
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "linked").symlink_to(folder)
    hub.remove("linked")
    assert (folder / "config.json").is_file()
    assert names_of(cache / "models") == []


def test_one_pull_at_a_time(folder):
    with model_cache.locked("mine"):
        with pytest.raises(UserError, match="another weft is at work on 'mine'"):
            quiet_pull(str(folder), save_as="mine")
        assert quiet_pull(str(folder), save_as="other").files
    assert quiet_pull(str(folder), save_as="mine").files


def test_a_pull_that_ended_before_its_last_rename_is_completed(folder, cache):
    model = quiet_pull(str(folder), save_as="mine")
    os.replace(model.path, cache / "models" / "mine.partial")
    assert hub.list_models() == []
    assert quiet_pull("mine", offline=True) == model


def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "file"))
    assert hub.list_models() == []
    with pytest.raises(UserError, match="cannot be written"):
        quiet_pull(str(folder), save_as="mine")


def test_importing_needs_no_torch():
    code = "import sys; from weft.weights import hub; hub.list_models(); print('torch' in sys.modules, 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False False\n"
