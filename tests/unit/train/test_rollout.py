"""Answers of the live policy: what they are a function of, and what must not be left over when weights change."""

import online_cases as online
import pytest
import tokenizers
import torch

from weft import kernels
from weft.data.answers import AnswerBatch, Answered
from weft.data.collate import TextRows
from weft.data.prompts import HELD_OUT, PromptBatches, PromptExample, collate, prompt_seed
from weft.engine import Engine, Request, SamplingParams
from weft.errors import UserError
from weft.nn.adapters import adapter_parameters, adapters_off, attach
from weft.objectives.online import answer_log_probs
from weft.objectives.reference import REFERENCE, reference_in, reference_of
from weft.objectives.rows import read_texts
from weft.spec.adapters import LoRA
from weft.tokenizer import Settings, Tokenizer
from weft.train.objective import POLICY
from weft.train.rollout import Sampling, check_sampling
from weft.weights.adapter_places import choose_places
from weft.zoo import family_of


@pytest.fixture
def tokenizer(tmp_path):
    return online.tokenizer_of(tmp_path)


def ids_of(rollouts, batch, n=3):
    return [[each.ids for each in group] for group in rollouts.sample([e.ids for e in batch.examples], batch.seeds, n)]


def test_answers_do_not_depend_on_how_many_are_written_at_a_time(tokenizer):
    batch = online.prompts_of(tokenizer)
    wide, narrow = (online.rollouts_of(tokenizer, {}, in_flight=rows) for rows in (64, 2))
    found = ids_of(wide, batch)
    assert found == ids_of(narrow, batch)
    assert len({ids for group in found for ids in group}) == 15
    assert found != ids_of(wide, online.prompts_of(tokenizer, step=1))  # another step, other luck
    alone = ids_of(wide, batch.rows(2, 3))
    assert alone == found[2:3]


def test_state_of_earlier_weights_is_never_used_again(tokenizer):
    batch, rollouts = online.prompts_of(tokenizer), online.rollouts_of(tokenizer, {})
    policy, long = rollouts.models[POLICY], batch.examples[-1].ids
    kept = Engine(policy, tokenizer)
    params = SamplingParams(9, temperature=1.0, seed=batch.seeds[-1])
    before = ids_of(rollouts, batch, 1)
    assert kept.generate([Request(long, params)])[0].ids == before[-1][0]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    after = ids_of(rollouts, batch, 1)
    fresh = online.rollouts_of(tokenizer, {POLICY: policy})
    assert after == ids_of(fresh, batch, 1) != before
    # Negative control: an engine that is kept answers out of a prefix cache that the old weights filled.
    assert kept.generate([Request(long, params)])[0].ids != after[-1][0]
    assert kept.stats.cached_prompt_tokens > 0


def test_the_policy_goes_back_to_training(tokenizer):
    rollouts = online.rollouts_of(tokenizer, {})
    policy = rollouts.models[POLICY].train()
    ids_of(rollouts, online.prompts_of(tokenizer), 1)
    assert policy.training
    policy.eval()
    ids_of(rollouts, online.prompts_of(tokenizer), 1)
    assert not policy.training


@pytest.mark.parametrize(("temperature", "adapter"), [(1.0, False), (1.0, True), (0.7, False)])
def test_the_sampler_and_the_training_pass_agree_on_every_token(tokenizer, temperature, adapter):
    batch, policy = online.prompts_of(tokenizer), online.policy_of()
    if adapter:
        settings = LoRA(rank=2, targets="all")
        attach(policy, settings, choose_places(policy, family_of(policy.spec), settings), seed=1)
        with torch.no_grad():
            for parameter in adapter_parameters(policy).values():
                parameter.add_(0.1)
    requests = [Request(e.ids, SamplingParams(9, 1.0, seed=s, logprobs=True)) for e, s in zip(batch.examples, batch.seeds, strict=True)]
    results = Engine(policy, tokenizer).generate(requests)
    texts = TextRows.lay([Answered(e.ids, r.ids) for e, r in zip(batch.examples, results, strict=True)])
    said = torch.tensor([each.logprob for result in results for each in result.logprobs], dtype=torch.float64)
    with torch.no_grad():
        found = answer_log_probs(policy, read_texts(policy, texts).output, texts, temperature).log_probs
    if adapter:  # both see it: without it they are other numbers
        with torch.no_grad(), adapters_off(policy):
            bare = answer_log_probs(policy, read_texts(policy, texts).output, texts).log_probs
        assert (bare - said).abs().max() > 1e-2
    if temperature == 1.0:
        torch.testing.assert_close(found, said, rtol=0, atol=1e-10)
    else:  # negative control: at another temperature they are other numbers
        assert (found - said).abs().max() > 1e-2


def test_passes_without_gradients_have_the_bits_of_training(tokenizer):
    layer = {"repeat": 6, "mixer": {"type": "attention", "heads": 4, "rope": {}}, "channel": {"type": "gated", "hidden": 512}}
    policy = online.policy_of(dtype=torch.float32, dim=320, norm={"type": "rms"}, layers=[layer]).train()
    rollouts = online.rollouts_of(tokenizer, {POLICY: policy})
    rollouts.products, rollouts.micro = torch.bfloat16, 4
    generator = torch.Generator().manual_seed(0)
    texts = TextRows.lay([Answered(torch.randint(200, (30,), generator=generator).tolist(), [7] * 12) for _ in range(4)])

    def compute(*_):
        return {"found": answer_log_probs(policy, read_texts(policy, texts).output, texts).log_probs.detach()[None]}

    def reference(*_):
        with reference_in({POLICY: policy, REFERENCE: reference_of(policy)[REFERENCE]}) as model:
            return {"found": answer_log_probs(model, read_texts(model, texts).output, texts).log_probs[None]}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained, beside = compute()["found"], reference()["found"]
        with torch.no_grad():
            native, evaluated = compute()["found"], reference()["found"]
    assert torch.equal(rollouts.passes(4, compute)["found"], trained)
    assert torch.equal(rollouts.passes(4, reference)["found"], trained)
    assert torch.equal(beside, trained)
    assert torch.equal(evaluated, native), "and outside training both are computed as they are there"
    if kernels.available():
        assert not torch.equal(native, trained), "control: native kernels add up in another order"


def test_log_probabilities_of_no_answer_at_all():
    policy = online.policy_of()
    texts = TextRows.lay([Answered([1, 2], [3])])
    nothing = TextRows(texts.tokens, texts.targets, torch.zeros_like(texts.mask), texts.lengths)
    found = answer_log_probs(policy, read_texts(policy, nothing).output, nothing, entropy=True)
    assert found.log_probs.shape == found.entropy.shape == (0,)
    found.log_probs.sum().backward()


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9])
def test_every_held_out_example_is_looked_at_once_by_some_process(count):
    examples = [PromptExample((n,), "p", f"f:{n}") for n in range(count)]
    shares = [PromptBatches(examples, collate, 4, 10, valid=examples, rank=rank, world=2) for rank in range(2)]
    seen = [example.ids[0] for share in shares for batch in share.validation() for example in batch.examples]
    assert sorted(seen) == (list(range(count)) if count > 1 else [0, 0]), "a process has one at least"
    assert len({len(list(share.validation())) for share in shares}) == 1


def test_prompts_know_their_luck_by_step_and_row():
    examples = [online.PromptExample((number,), str(number), f"p:{number}") for number in range(20)]
    whole = PromptBatches(examples, collate, 6, 10, seed=4, valid=examples[:5])
    halves = [PromptBatches(examples, collate, 6, 10, seed=4, valid=examples[:5], rank=rank, world=2) for rank in (0, 1)]
    batch = whole.batch(3)
    assert batch.seeds == tuple(prompt_seed(4, 3, 18 + row) for row in range(6))
    assert batch.seeds == tuple(seed for half in halves for seed in half.batch(3).seeds)
    assert [e.ids for e in batch.examples] == [e.ids for half in halves for e in half.batch(3).examples]
    held_out = list(whole.validation())
    assert [b.step for b in held_out] == [HELD_OUT]
    apart = {seed for half in halves for b in half.validation() for seed in b.seeds}
    assert apart == set(held_out[0].seeds)
    assert len({prompt_seed(seed, step, row) for seed in (0, 1) for step in (-1, 0, 7) for row in range(4)}) == 24
    other = PromptBatches(examples, collate, 6, 10, seed=4)
    other.facts = {"tokens": 3}
    assert other.describe() != whole.describe() == PromptBatches(examples, collate, 6, 10, seed=4, valid=examples[:5]).describe()


def answers(rows=7):
    texts = TextRows.lay([Answered([1] * (row + 1), [2] * (2 * row % 5 + 1)) for row in range(rows)])
    number = torch.arange(rows, dtype=torch.float32)
    return AnswerBatch(texts, {"number": number}, {"table": number[:, None] * texts.mask}, seed=11)


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 1), (3, 2), (2, 7)])
def test_every_answer_is_in_every_epoch_once(epochs, minibatches):
    parts = answers().updates(epochs, minibatches)
    assert len(parts) == epochs * minibatches
    for epoch in range(epochs):
        seen = [part.columns["number"] for part in parts[epoch * minibatches : (epoch + 1) * minibatches]]
        assert sorted(torch.cat(seen).tolist()) == list(range(7))
        assert max(map(len, seen)) - min(map(len, seen)) <= 1
    for part in parts:
        assert part.texts.lengths.tolist() == sorted(part.texts.lengths.tolist(), reverse=True)
        torch.testing.assert_close(part.tables["table"], part.columns["number"][:, None] * part.texts.mask)
        narrow = part.rows(part.num_rows - 1, part.num_rows)
        assert narrow.tables["table"].shape == narrow.texts.tokens.shape
        assert narrow.texts.mask.sum() == part.texts.mask[-1].sum()
    again = answers().updates(epochs, minibatches)
    assert all(torch.equal(a.columns["number"], b.columns["number"]) for a, b in zip(parts, again, strict=True))


def test_something_has_to_end_an_answer(tokenizer):
    endless = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})), Settings())
    assert not endless.eos_ids
    with pytest.raises(UserError, match=r"the tokenizer has no end token, so every answer would go on to its limit; give objective\.stop"):
        check_sampling(Sampling(8), endless)
    check_sampling(Sampling(8, stop=(".",)), endless)
    check_sampling(Sampling(8), tokenizer)
