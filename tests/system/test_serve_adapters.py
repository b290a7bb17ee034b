"""Adapters under names of their own on a server, and on the command line."""

import json

import pytest
import torch
from serve_cases import make_model
from starlette.testclient import TestClient
from typer.testing import CliRunner

from weft.cli.main import app as weft
from weft.errors import UserError
from weft.nn.adapters import adapter_parameters
from weft.serve.server import Options, open_app
from weft.spec.adapters import LoRA, Prefix
from weft.weights.adapter_files import adapt
from weft.weights.load import load_model
from weft.weights.save import save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and adapters for it: two of LoRA, one DoRA, one prefix."""
    folder = tmp_path_factory.mktemp("served")
    make_model(folder / "base")
    forms = {"a": LoRA(rank=2), "b": LoRA(rank=4, targets=("v_proj",)), "dora": LoRA(dora=True), "prefix": Prefix(tokens=3)}
    for seed, (name, settings) in enumerate(forms.items()):
        loaded = load_model(folder / "base")
        adapt(loaded.model, settings, loaded.checkpoint.family, loaded.checkpoint.source)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(loaded.model).values():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.4
        save_model(loaded.model, folder / name)
    return folder


def generated(*arguments):
    given = ["generate", *map(str, arguments), "-p", "the quick", "--max-tokens", "8", "--dtype", "float32", "--json"]
    outcome = CliRunner().invoke(weft, given, catch_exceptions=True)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return json.loads(outcome.stdout.splitlines()[-1])["text"]


def test_the_model_field_chooses_the_base_or_an_adapter(place):
    options = Options(dtype="float32", device="cpu", rows=4, memory=20_000_000, adapters=(f"first={place / 'a'}", str(place / "b")))
    with TestClient(open_app([str(place / "base")], options).asgi, base_url="http://127.0.0.1") as client:
        listed = client.get("/v1/models").json()["data"]
        assert [(each["id"], each.get("parent")) for each in listed] == [("base", None), ("first", "base"), ("b", "base")]
        said = {}
        for name in ("base", "first", "b"):
            body = {"model": name, "prompt": "the quick", "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["model"] == name
            said[name] = answer["choices"][0]["text"]
            chat = {"model": name, "messages": [{"role": "user", "content": "the quick"}], "max_tokens": 4}
            assert client.post("/v1/chat/completions", json=chat).json()["model"] == name
        vectors = [client.post("/v1/embeddings", json={"model": name, "input": "fox"}).json()["data"][0]["embedding"] for name in said]
        assert vectors[0] != vectors[1] != vectors[2] != vectors[0]
        wrong = client.post("/v1/completions", json={"model": "frst", "prompt": "x"})
        assert wrong.status_code == 404
        assert "Did you mean 'first'" in wrong.json()["error"]["message"]
        assert "weft" in client.get("/metrics").text
    assert said["base"] == generated(place / "base")
    assert said["first"] == generated(place / "base", "--adapter", place / "a") == generated(place / "a")
    assert said["b"] == generated(place / "b")
    assert len(set(said.values())) == 3


def test_a_prefix_is_opened_as_a_model(place):
    assert generated(place / "prefix") == generated(place / "base", "--adapter", place / "prefix") != generated(place / "base")


@pytest.mark.parametrize(
    ("models", "adapters", "message"),
    [
        (["base"], ["dora"], "is of the form dora; adapters side by side must be plain lora"),
        (["base"], ["prefix"], "is of the form prefix; adapters side by side"),
        (["base"], ["a", "one=b", "two=b", "two=a"], "two adapters would be served as 'two'"),
        (["a=base"], ["a"], "a model and an adapter would both be served as 'a'"),
        (["base", "x=base"], ["a"], "adapters belong to one model"),
        (["a"], ["b"], "is an adapter itself; give the model that it is for"),
        (["base"], ["x=base"], r"has no adapter_config\.json"),
    ],
)
def test_what_cannot_be_served_side_by_side_is_refused(models, adapters, message, place):
    def full(given):
        name, _, folder = given.rpartition("=")
        return f"{name}={place / folder}" if name else str(place / folder)

    with pytest.raises(UserError, match=message):
        open_app([full(each) for each in models], Options(dtype="float32", device="cpu", adapters=tuple(map(full, adapters))))


def test_two_adapters_for_one_text_are_refused(place):
    with pytest.raises(UserError, match="--adapter is given 2 times"):
        generated(place / "base", "--adapter", place / "a", "--adapter", place / "b")
    with pytest.raises(UserError, match="is an adapter and so is"):
        generated(place / "a", "--adapter", place / "b")
