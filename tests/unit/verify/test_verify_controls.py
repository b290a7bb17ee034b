"""Negative controls: something is broken on purpose, and exactly the check that is meant to see it fails."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from verify_cases import checks, failing, folder

from weft.engine import Engine
from weft.engine.prefix import PrefixCache
from weft.engine.stop import TextStream
from weft.nn import Model
from weft.nn.mamba import Mamba
from weft.tokenizer import Tokenizer
from weft.weights import save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder("hybrid", tmp_path_factory.mktemp("models"))


def disturb(monkeypatch: pytest.MonkeyPatch, when: Callable[[Tensor, Any], bool], factor: float = 1.5) -> None:
    """Make a model see other embeddings in some passes: `when` is given the tokens [B, T] and the views."""
    real = Model.forward

    def forward(self: Model, tokens: Tensor, step: Any = None, views: Any = None, memory: Any = None) -> Any:
        handle = None
        if when(tokens, views):
            handle = self.blocks[0].register_forward_pre_hook(lambda module, given: (given[0].roll(1, -1) * factor, *given[1:]))
        try:
            return real(self, tokens, step, views, memory)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(Model, "forward", forward)


def test_another_rotation_than_the_config_says(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weft with other frequencies agrees with itself everywhere; only an independent implementation can tell."""
    from weft.verify import subject

    real = subject.load_weights

    def load(*arguments: Any) -> Model:
        model = real(*arguments)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer * 1.01)
        return model

    monkeypatch.setattr(subject, "load_weights", load)
    found = checks(llama, "float64")
    assert [name for name, check in found.items() if check.outcome.status == "fail"] == ["parity with transformers"]
    assert "weft against transformers: logits first differ after token" in found["parity with transformers"].outcome.detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_looks_at_its_company(dtype: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda tokens, views: tokens.shape[0] > 1)
    found = checks(llama, dtype)
    assert [name for name, check in found.items() if check.outcome.status == "fail"] == ["batch == single"]
    detail = found["batch == single"].outcome.detail
    assert "new token" in detail
    assert "together" in detail
    assert "alone" in detail


def test_a_model_that_looks_at_the_length_of_a_chunk(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda tokens, views: tokens.shape[1] == 7)
    found = checks(llama)
    assert [name for name, check in found.items() if check.outcome.status == "fail"] == ["chunked == whole"]
    assert found["chunked == whole"].outcome.detail.startswith("chunks of 7 against one pass: logits first differ after token 1 of ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_that_is_not_training(dtype: str, hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda tokens, views: views is None, factor=1.0)
    assert failing(hybrid, dtype) == ["incremental == parallel"]


def test_a_recurrent_state_that_is_forgotten(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that commits never change: all generation is wrong, by chunk bounds in several ways, and parts with what one pass gives."""
    monkeypatch.setattr(Mamba, "commit", lambda self, views, pending, accepted: dict(views))
    assert failing(hybrid) == ["incremental == parallel", "chunked == whole", "prefix cache == fresh", "speculation == plain"]


@pytest.mark.parametrize("ignored", ["the last token of a block", "the blocks before"])
def test_a_cache_that_takes_one_text_for_another(ignored: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extend(self: PrefixCache, chain: list[bytes], ids: Any, adapter: int = 0) -> None:
        for end in range((len(chain) + 1) * self.page, len(ids) + 1, self.page):
            block = list(ids[end - self.page : end])
            known = [chain[-1:], block[:-1]] if ignored == "the last token of a block" else [end, block]
            chain.append(blake2b(repr(known).encode(), digest_size=16).digest())

    monkeypatch.setattr(PrefixCache, "extend", extend)
    found = checks(llama)
    assert [name for name, check in found.items() if check.outcome.status == "fail"] == ["prefix cache == fresh"]
    assert "from kept state" in found["prefix cache == fresh"].outcome.detail


def test_a_draft_of_which_too_much_stands(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.engine import engine

    real = engine.judge

    def judge(text: Any, draft: Any, logits: Tensor, chosen: Any) -> Any:
        verdict = real(text, draft, logits, chosen)
        return replace(verdict, accepted=min(verdict.accepted + 1, len(draft.ids)))

    monkeypatch.setattr(engine, "judge", judge)
    assert failing(llama) == ["speculation == plain"]


def test_a_stream_that_loses_text(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TextStream.push

    def push(self: TextStream, index: int) -> str:
        return real(self, index)[:1]

    monkeypatch.setattr(TextStream, "push", push)
    found = checks(llama)
    assert [name for name, check in found.items() if check.outcome.status == "fail"] == ["stream == non-stream"]
    assert "the streamed text differs from the whole at place" in found["stream == non-stream"].outcome.detail


def test_a_stream_that_loses_tokens(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.stream
    listening: list[bool] = []

    def stream(self: Engine, requests: Any) -> Iterator[Any]:
        events = real(self, requests)
        return events if listening else (event for number, event in enumerate(events) if number != 3)

    def generate(self: Engine, requests: Any) -> Any:
        listening.append(True)
        try:
            results = [event.result for event in self.stream(requests) if event.result is not None]
            return sorted(results, key=lambda result: (result.request, result.index))
        finally:
            listening.pop()

    monkeypatch.setattr(Engine, "stream", stream)
    monkeypatch.setattr(Engine, "generate", generate)
    assert failing(llama) == ["stream == non-stream"]


def test_weights_that_are_saved_with_a_mistake(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = save.stored_tensors

    def stored(tensors: Any, rules: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in real(tensors, rules):
            yield name, tensor * (1 + 1e-6) if name.endswith("q_proj.weight") else tensor

    monkeypatch.setattr(save, "stored_tensors", stored)
    found = checks(llama)
    assert [name for name, check in found.items() if check.outcome.status == "fail"] == ["save == load"]
    assert "logits after token" in found["save == load"].outcome.detail


def test_a_second_bos(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def framed(self: Tokenizer, ids: list[int], bos: bool | None) -> list[int]:
        return ids if bos is False else [*self.settings.prefix, *ids]

    monkeypatch.setattr(Tokenizer, "_framed", framed)
    found = checks(llama)
    assert [name for name, check in found.items() if check.outcome.status == "fail"] == ["one BOS"]
    assert "begins with 2 BOS ('<s>'), where 1 is right" in found["one BOS"].outcome.detail


def test_a_check_that_breaks_down_is_a_failure(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_model(*arguments: Any, **named: Any) -> Any:
        raise IndexError("no place for this")

    from weft.verify import files

    monkeypatch.setattr(files, "save_model", save_model)
    found = checks(llama)
    assert [name for name, check in found.items() if check.outcome.status == "fail"] == ["save == load"]
    assert found["save == load"].outcome.detail == "it stopped with IndexError: no place for this"


def test_a_disturbance_that_never_happens_fails_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda tokens, views: False)
    assert failing(llama) == []
