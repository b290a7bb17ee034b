"""Beam search against a search of everything, and against transformers."""

import itertools

import pytest
import torch
from engine_cases import llama, memory_for, model_of, random_ids

from weft.engine import Engine, Request, SamplingParams, score
from weft.engine.beam import BeamSearch


def every_text(model, prompt, ends, limit):
    """All continuations that end with an end token or at the limit, with their log-probabilities."""
    vocab = model.spec.vocab
    texts = [
        ids
        for length in range(1, limit + 1)
        for ids in itertools.product(range(vocab), repeat=length)
        if not any(token in ends for token in ids[:-1]) and (ids[-1] in ends or length == limit)
    ]
    with torch.no_grad():
        totals = {}
        for ids in texts:
            logprobs = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
            totals[ids] = sum(logprobs[len(prompt) - 1 + place, token].item() for place, token in enumerate(ids))
    return totals


@pytest.fixture(scope="module")
def tiny():
    model = llama(vocab=5)
    prompt = [1, 3, 2]
    return model, prompt, every_text(model, prompt, {0}, 4)


def search(model, prompt, ends, limit, width, length_penalty, patient=True):
    """Beam search without an engine: a parallel pass over every running text."""
    beams = BeamSearch(width, length_penalty, limit, lambda ids: ids[-1] in ends, len(ends), patient)
    while not beams.done:
        with torch.no_grad():
            logits = torch.stack([model(torch.tensor([[*prompt, *h.ids]])).logits[0, -1] for h in beams.running])
        beams.advance(logits)
    return beams


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 2.0])
def test_a_width_that_keeps_everything_finds_the_best_texts(tiny, length_penalty):
    model, prompt, totals = tiny
    ranked = sorted(((total / len(ids) ** length_penalty, ids) for ids, total in totals.items()), reverse=True)
    found = search(model, prompt, {0}, 4, 256, length_penalty)
    assert [h.ids for h in found.best(20)] == [ids for _, ids in ranked[:20]]
    assert [found.score(h) for h in found.best(20)] == pytest.approx([value for value, _ in ranked[:20]], abs=1e-10)
    if length_penalty in (-1.0, 2.0):
        other = sorted(((total / len(ids) ** 0.7, ids) for ids, total in totals.items()), reverse=True)
        assert [ids for _, ids in other[:20]] != [ids for _, ids in ranked[:20]], "control: the penalty matters"


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_the_engine_finds_what_plain_search_finds(tiny, width, length_penalty):
    model, prompt, _ = tiny
    want = search(model, prompt, {0}, 9, width, length_penalty, patient=False)
    params = SamplingParams(max_tokens=9, beams=width, n=width, length_penalty=length_penalty, stop_ids=(0,), logprobs=True)
    found = Engine(model, rows=width).generate([Request(prompt, params)])
    assert [result.ids for result in found] == [h.ids for h in want.best(width)]
    assert [result.score for result in found] == pytest.approx([want.score(h) for h in want.best(width)], abs=1e-10)
    for result in found:
        rescored = score(model, [[*prompt, *result.ids]])[0].logprobs[len(prompt) - 1 :]
        assert [token.logprob for token in result.logprobs] == pytest.approx(rescored, abs=1e-9)
        assert result.finish_reason == ("stop" if result.ids[-1] == 0 else "length")


@pytest.mark.parametrize("name", ["gqa", "window", "mamba", "lstm", "hybrid", "cross"])
def test_states_follow_their_beams(name):
    """A beam whose state was not carried along would have other log-probabilities than its text."""
    model, prompt, memory = model_of(name), random_ids(9, 2), memory_for(name, 1)
    params = SamplingParams(max_tokens=10, beams=4, n=4, logprobs=True)
    found = Engine(model, rows=4, chunk=7).generate([Request(prompt, params, memory)])
    memories = None if memory is None else [memory] * 4
    for result, rescored in zip(found, score(model, [[*prompt, *r.ids] for r in found], memories=memories), strict=True):
        assert [token.logprob for token in result.logprobs] == pytest.approx(rescored.logprobs[len(prompt) - 1 :], abs=1e-9)
    assert len({result.ids for result in found}) == 4


def test_beams_that_do_not_fork_their_state_are_noticed(monkeypatch):
    from weft.nn import Arena

    model, prompt = model_of("hybrid"), random_ids(9, 2)
    params = SamplingParams(max_tokens=10, beams=4, n=4, logprobs=True)
    monkeypatch.setattr(Arena, "fork", lambda arena, source, target: None)
    found = Engine(model, rows=4, chunk=7).generate([Request(prompt, params)])
    drifts = [
        max(abs(token.logprob - value) for token, value in zip(result.logprobs, rescored.logprobs[len(prompt) - 1 :], strict=True))
        for result, rescored in zip(found, score(model, [[*prompt, *r.ids] for r in found]), strict=True)
    ]
    assert max(drifts) > 1e-3


def test_beams_beside_other_requests():
    model = llama()
    beam = Request(random_ids(12, 5, 97), SamplingParams(max_tokens=9, beams=3, n=2))
    others = [Request(random_ids(n, n, 97), SamplingParams(max_tokens=11)) for n in (3, 8, 1, 20)]
    mixed = Engine(model, rows=4, chunk=7).generate([*others[:2], beam, *others[2:]])
    alone = [Engine(model, rows=4, chunk=7).generate([request]) for request in (*others[:2], beam, *others[2:])]
    assert [result.ids for result in mixed] == [result.ids for results in alone for result in results]


def test_equal_to_transformers():
    transformers = pytest.importorskip("transformers")
    spec = llama().spec
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=spec.norm.eps,
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=7,
        pad_token_id=0,
    )
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    copy_weights(llama(), theirs)
    for seed, width, length_penalty in itertools.product((1, 2), (2, 5), (0.0, 1.0, 2.0)):
        prompt = random_ids(8, seed, 97)
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=12,
                num_beams=width,
                num_return_sequences=width,
                length_penalty=length_penalty,
                do_sample=False,
                early_stopping=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
        params = SamplingParams(max_tokens=12, beams=width, n=width, length_penalty=length_penalty, stop_ids=(7,))
        ours = Engine(llama(), rows=width).generate([Request(prompt, params)])
        for result, ids, value in zip(ours, out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
            assert list(result.ids) == ids[: len(result.ids)]
            assert result.score == pytest.approx(value, abs=1e-5)


def copy_weights(ours, theirs):
    """Our fused projections into transformers' separate ones."""
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(ours.embed.weight)
        theirs.lm_head.weight.copy_(ours.head.weight)
        theirs.model.norm.weight.copy_(ours.norm.weight)
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            q, k, v = block.mixer.qkv.weight.split([32, 16, 16])
            gate, up = block.channel.gate_up.weight.chunk(2)
            attention, mlp = layer.self_attn, layer.mlp
            pairs = [(attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v), (attention.o_proj, block.mixer.out.weight)]
            pairs += [(mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, block.channel.down.weight)]
            pairs += [(layer.input_layernorm, block.mixer_norm.weight), (layer.post_attention_layernorm, block.channel_norm.weight)]
            for module, weight in pairs:
                module.weight.copy_(weight)
