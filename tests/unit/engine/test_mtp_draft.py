"""Drafts by modules for multi-token prediction: the same drafts as a computation from scratch, and the same texts as without."""

from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import tokenizers
import torch
from engine_cases import CHUNK, SPECS, drift, llama, llama_spec, random_ids
from test_engine_scheduling import NOTHING, leaks
from test_engine_speculation import chi_square, leaks_of_drafter, mixed_requests, pair_probabilities

from weft.engine import Engine, Request, SamplingParams
from weft.engine.mtp_draft import MTPDrafter
from weft.engine.open import _mtp_depth, open_model
from weft.engine.speculation import DraftLength, FixedLength, Speculation
from weft.errors import UserError
from weft.nn import Arena, Model, Step, build
from weft.spec import ModelSpec
from weft.tokenizer import load_tokenizer
from weft.weights.save import save_model

TOLERANCE = 1e-10
NAMES = ["gqa", "window", "mamba", "hybrid"]


def with_modules(spec: ModelSpec, kind="sequential", depth=2) -> ModelSpec:
    return ModelSpec.model_validate({**spec.model_dump(), "mtp": {"type": kind, "depth": depth}})


@lru_cache(maxsize=8)
def model_of(name, kind="sequential", depth=2) -> Model:
    return build(with_modules(SPECS[name], kind, depth), dtype=torch.float64, seed=0).eval()


def with_drafts(drafter, rows=3, most=5, **options):
    return Engine(drafter.model, rows=rows, chunk=CHUNK, page=4, draft=Speculation(drafter, FixedLength(most)), **options)


def from_scratch(model, ids, count):
    """The greedy draft after a text, every module run over the whole of it."""
    draft, length = [], len(ids) - 1
    with torch.no_grad():
        hidden = trunk = model(torch.tensor([ids[:length]])).hidden
        for k, module in enumerate(model.mtp, 1):
            step = Step.parallel(torch.tensor([ids[:length]]))
            further = torch.tensor([[*ids, *draft][k : k + length]])
            ahead = model.enter(further, step) if module.eh_proj is not None else None
            hidden = module(hidden if ahead is not None else trunk, ahead, step)[0]
            draft.append(int(model.logits(hidden[:, -1]).argmax()))
    return draft[:count]


class Checked(MTPDrafter):
    """Compares its greedy drafts with those from scratch."""

    same = different = 0

    def propose(self, texts, most):
        drafts = super().propose(texts, most)
        for text, draft, count in zip(texts, drafts, most, strict=True):
            if text.plain and draft.ids:
                right = from_scratch(self.model, [*text.task.prompt, *text.ids], min(count, self.longest)) == draft.ids
                self.same, self.different = self.same + right, self.different + (not right)
        return drafts


@pytest.mark.parametrize("kind", ["sequential", "independent"])
@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_those_from_scratch_and_texts_those_without(name, kind):
    model = model_of(name, kind)
    requests = [request for request in mixed_requests(name) if request.params.n == 1]  # the other samples of a prompt begin after it
    requests += [Request(random_ids(length, length), SamplingParams(max_tokens=20, logprobs=True)) for length in (1, 8, 13, 30)]
    drafter = Checked(model, rows=3, chunk=5)
    engine = with_drafts(drafter, cache=False)
    right = Engine(model, rows=3, chunk=CHUNK).generate(requests)
    assert drift(engine.generate(requests), right) < TOLERANCE
    assert drafter.same > 10
    assert drafter.different == 0
    assert leaks(engine) == leaks_of_drafter(drafter) == NOTHING
    assert not drafter._texts


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_any_depth_and_chunks_shorter_than_it(kind, depth):
    model, requests = model_of("gqa", kind, depth), mixed_requests("gqa")
    right = Engine(model, rows=3, chunk=CHUNK).generate(requests)
    for chunk, asked in ((1, None), (4, 1), (50, None)):
        drafter = Checked(model, asked, rows=2, chunk=chunk)
        assert drift(with_drafts(drafter).generate(requests), right) < TOLERANCE
        assert drafter.same > 0
        assert drafter.longest == (asked or depth)


def test_a_state_that_is_one_place_off_is_noticed(monkeypatch):
    """Control: other drafts come out, and still the same texts."""
    model, requests = model_of("gqa"), [Request(random_ids(9, n), SamplingParams(max_tokens=20, logprobs=True)) for n in range(3)]
    right, drafter = Engine(model).generate(requests), Checked(model)
    engine, commit = with_drafts(drafter, cache=False), Arena.commit

    def careless(arena, pending, accepted, rows=None):
        commit(arena, pending, accepted, rows)
        if arena is drafter._lanes.arena:
            arena.lens += 1

    monkeypatch.setattr(Arena, "commit", careless)
    assert drift(engine.generate(requests), right) < TOLERANCE
    assert drafter.different > 0


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes, in Hugging Face's layout."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


@lru_cache(maxsize=2)
def trained(kind):
    """A model that has learned to count on, and to foretell how."""
    model = build(with_modules(llama_spec(vocab=23), kind), seed=1)
    tokens = (torch.arange(40)[None] * 3 + torch.arange(23)[:, None]) % 23
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        output = model(tokens, ahead=True)
        loss = sum(
            torch.nn.functional.cross_entropy(model.logits(hidden[:, : -1 - k]).flatten(0, 1), tokens[:, 1 + k :].flatten())
            for k, hidden in enumerate((output.hidden, output.aux["mtp.1"], output.aux["mtp.2"]))
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.double().eval()


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_modules_that_have_learned_save_passes(kind):
    model = trained(kind)
    requests = [Request([n, n + 3, n + 6], SamplingParams(max_tokens=30, logprobs=True)) for n in (1, 4)]
    right = Engine(model).generate(requests)
    engine = with_drafts(MTPDrafter(model))
    assert drift(engine.generate(requests), right) < TOLERANCE
    stats = engine.stats
    assert stats.accepted_tokens > 0.8 * stats.drafted_tokens
    assert stats.accepted_tokens > 30, "two of three tokens cost no pass"


def test_sampled_texts_keep_their_distribution():
    spec = llama_spec(vocab=5, context=32)
    model = build(with_modules(spec), dtype=torch.float64, seed=3).eval()
    engine, total, prompt = with_drafts(MTPDrafter(model), rows=16, most=2), 1000, [1, 2, 3, 1, 2, 3]
    settings = {"temperature": 0.8, "top_k": 4, "max_tokens": 3}
    results = engine.generate([Request(prompt, SamplingParams(seed=seed, **settings)) for seed in range(total)])
    counts = Counter(result.ids[0] * 5 + result.ids[1] for result in results)
    assert chi_square(counts, pair_probabilities(model, prompt, 0.8, 4), total) < 2.0
    assert 0 < engine.stats.accepted_tokens < engine.stats.drafted_tokens
    other = build(spec, dtype=torch.float64, seed=4).eval()
    assert chi_square(counts, pair_probabilities(other, prompt, 0.8, 4), total) > 10, "control: another model's"


def test_prefixes_from_the_cache_preemption_and_little_room():
    model = trained("sequential")
    prompt = [(3 * n) % 23 for n in range(30)]
    requests = [Request([*prompt, n], SamplingParams(max_tokens=25, logprobs=True)) for n in range(5)]
    right = Engine(model, cache=False).generate(requests)
    engine = with_drafts(MTPDrafter(model), rows=5)
    for _ in range(2):  # the second time, prompts come from the cache
        assert drift(engine.generate(requests), right) < TOLERANCE
    assert engine.stats.cached_prompt_tokens > 100
    assert engine.stats.accepted_tokens > 0
    small = MTPDrafter(model, rows=2)
    small._lanes.arena.allow_pages(1, 1)
    engine = with_drafts(small, rows=5)
    engine._lanes.max_pages = 24
    engine._lanes.arena.allow_pages(24, 24)
    assert drift(engine.generate(requests), right) < TOLERANCE
    assert engine.stats.preemptions > 0
    assert leaks(engine) == leaks_of_drafter(small) == NOTHING
    assert not small._texts


def test_how_far_to_draft_is_not_more_than_there_are_modules():
    model = trained("sequential")
    engine = Engine(model, draft=MTPDrafter(model))
    assert isinstance(engine._speculation.length, DraftLength)
    assert engine._speculation.length.most == 2
    engine.generate([Request([1, 4, 7], SamplingParams(max_tokens=60))])
    assert engine.stats.drafted_tokens > 0
    assert {count for _, count in engine._speculation.length._seconds} <= {0, 1, 2}


def test_what_cannot_be_drafted_with_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="the model has no modules for multi-token prediction to draft with"):
        MTPDrafter(llama())
    model = model_of("gqa")
    for depth in (0, 3):
        with pytest.raises(UserError, match=f"drafts of {depth} tokens are asked of a model that has modules .* for 2; ask for 1 to 2"):
            MTPDrafter(model, depth)
    with pytest.raises(UserError, match="belong to another model"):
        Engine(llama(), draft=MTPDrafter(model))
    assert [_mtp_depth(word, model.spec) for word in ("mtp", "mtp:1", "mtp:2", "ngram", "mtp:x")] == [2, 1, 2, None, None]
    with pytest.raises(UserError, match="drafts of 7 tokens"):
        _mtp_depth("mtp:7", model.spec)


def test_opens_by_name(tmp_path):
    spec = with_modules(llama_spec(vocab=256))
    model = build(spec, seed=0).eval()
    save_model(model, tmp_path / "model", load_tokenizer(save_tokenizer(tmp_path / "tokenizer")))
    engine = open_model(tmp_path / "model", dtype="float32", draft="mtp:1").engine(rows=2, memory=1 << 24)
    assert engine._speculation.drafter.longest == 1
    assert engine.generate([Request([1, 2, 3], SamplingParams(max_tokens=12))])[0].ids
    assert engine.stats.drafted_tokens > 0
