"""Fine-tuning on answers: packing and accumulation leave the gradient alone, noise is what it should be, and resume is exact."""

import math

import pytest
import torch
import train_cases as cases
from test_trainer import CrashAfter, Stop, _weights

from record_cases import TALK, chat_tokenizer, write
from weft.data.batches import Batches
from weft.data.encode_records import RecordEncoder
from weft.data.prepare_records import RecordSettings, prepare_records, why_dropped
from weft.data.record_kinds import Conversation
from weft.data.shards import open_shards
from weft.data.store import TokenStore
from weft.data.windows import cut
from weft.errors import UserError
from weft.objectives.settings import SFTSettings
from weft.objectives.sft import SFT, document_lengths
from weft.tokenizer import load_tokenizer
from weft.train.assemble import run_recipe
from weft.train.history import read_metrics
from weft.train.objective import POLICY
from weft.train.parallel import World
from weft.train.recipe import recipe
from weft.train.window import loss_function, open_window, run_window

TEXTS = ["hi", "two words", "a longer question?", "x" * 30, "the cat sat", "on the mat", "¿y?"]
TALKS = [
    (TALK[0] | {"content": text}, TALK[1] | {"content": f"{text}, you say."}, *TALK[2:][: 2 * (i % 2)]) for i, text in enumerate(TEXTS)
]


def _encoded():
    return [RecordEncoder(chat_tokenizer()).conversation(Conversation(talk, "a:1")) for talk in TALKS]


def _batch(mode):
    """All conversations in one batch, none of them cut."""
    texts = _encoded()
    store = TokenStore.from_lists([text.ids for text in texts], masks=[text.trained for text in texts])
    length = store.num_tokens if mode in ("pack", "stream") else 130
    windows = cut(store, length, mode)
    return Batches(windows, windows.num_rows, shuffle=False).batch(0)


def _model(**changes):
    return cases.model_of(vocab=chat_tokenizer().vocab_size, context=200, **changes)


def _gradients(batch, micro=None, settings=None):
    model, objective = _model().eval(), SFT(settings, chunk=13)
    window, _ = open_window(objective, batch, micro, torch.device("cpu"), World())
    sums = run_window(window, loss_function(objective, {POLICY: model}, torch.float64), list(model.parameters()), World())
    return (sums.sums["sft"] / sums.counts["sft"]).item(), dict(cases.gradients(model)), batch.num_rows


def test_packing_padding_and_accumulation_leave_loss_and_gradients_alone():
    smoothing = SFTSettings(label_smoothing=0.1)
    loss, expected, rows = _gradients(_batch("pad"), settings=smoothing)
    assert rows == len(TEXTS)
    found = {mode: _gradients(_batch(mode), micro, smoothing) for mode, micro in (("pack", None), ("best_fit", None), ("best_fit", 2))}
    found["pad by 3"] = _gradients(_batch("pad"), 3, smoothing)
    assert found["pack"][2] == 1
    assert 1 < found["best_fit"][2] < len(TEXTS)
    for mode, (other, gradients, _) in found.items():
        assert other == pytest.approx(loss, abs=1e-10), mode
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=0, atol=1e-10)
    # Negative control: a stream, in which a conversation sees the one before, is another loss.
    assert abs(_gradients(_batch("stream"), settings=smoothing)[0] - loss) > 1e-3


def test_the_loss_is_the_mean_over_what_the_assistant_says():
    model, batch = _model().eval(), _batch("best_fit")
    sums, count = 0.0, 0
    for text in _encoded():
        logits = model(torch.tensor([text.ids])).logits[0, :-1].log_softmax(-1)
        for at, (token, trained) in enumerate(zip(text.ids[1:], text.trained[1:], strict=True)):
            sums, count = (sums - logits[at, token].item(), count + 1) if trained else (sums, count)
    loss, _, _ = _gradients(batch)
    assert loss == pytest.approx(sums / count, abs=1e-10)
    assert count == batch.num_targets == sum(text.num_trained for text in _encoded())


def test_noise_is_uniform_over_what_the_documents_length_allows_and_only_in_training():
    batch, model = _batch("best_fit"), _model()
    objective = SFT(SFTSettings(neftune=5.0))
    assert objective.step(model.eval(), batch).noise is None
    step = objective.step(model.train(), batch)
    torch.manual_seed(0)
    noise = model.enter(batch.tokens, step) - model.embed(batch.tokens)
    scaled = noise * (document_lengths(batch) * model.spec.dim).sqrt()[..., None] / 5.0
    assert scaled.abs().max() <= 1
    assert scaled.abs().max() > 0.99
    assert scaled.mean().abs() < 0.01
    assert scaled.std().item() == pytest.approx(math.sqrt(1 / 3), abs=0.01)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(objective.loss({POLICY: model}, batch)[0]["sft"].sum.item())
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != SFT().loss({POLICY: model}, batch)[0]["sft"].sum.item()


def test_gradient_checkpointing_changes_nothing():
    batch, found = _batch("best_fit"), []
    for again, seed in ((False, 0), (True, 0), (True, 1)):
        model = _model(dropout={"embed": 0.1, "attention": 0.1, "residual": 0.1}).train()
        model.gradient_checkpointing = again
        torch.manual_seed(seed)
        SFT(SFTSettings(neftune=5.0)).loss({POLICY: model}, batch)[0]["sft"].sum.backward()
        found.append(dict(cases.gradients(model)))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=1e-10)
    assert (found[2]["embed.weight"] - found[0]["embed.weight"]).abs().max() > 1e-3, "negative control: other noise"


def test_a_documents_length_does_not_depend_on_its_packing():
    lengths = {}
    for mode in ("pad", "best_fit"):
        batch = _batch(mode)
        shown = torch.stack([document_lengths(batch), batch.tokens.float(), batch.positions.float()], -1)
        lengths[mode] = sorted(map(tuple, shown[batch.tokens > 0].tolist()))
    assert lengths["pad"] == lengths["best_fit"]
    assert {int(length) for length, _, _ in lengths["pad"]} == {text.num_tokens - 1 for text in _encoded()}


# From a file of records to a run.


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "talks.jsonl", [{"messages": list(talk)} for talk in TALKS * 6])
    chat_tokenizer().save(tmp_path / "tok")
    return tmp_path


def _recipe(folder, **changes):
    made = {
        "model": {**cases.LLAMA, "vocab": chat_tokenizer().vocab_size, "context": 64},
        "data": str(folder / "talks.jsonl"),
        "tokenizer": str(folder / "tok"),
        "out": str(folder / "run"),
        "steps": 6,
        "objective": {"type": "sft", "neftune": 5},
        "batch": {"rows": 4, "micro": 3},
        "eval": {"every": 3},
        "save": {"every": 2, "minutes": None},
        "log": {"every": 1, "plot": False},
        "dtype": "float32",
    }
    return recipe({**made, **changes})


def test_a_run_that_crashed_and_went_on_is_the_run_that_did_not(folder):
    run_recipe(_recipe(folder, out=str(folder / "straight")))
    for crash in (1, 3, 5):
        with pytest.raises(Stop):
            run_recipe(_recipe(folder), callbacks=[CrashAfter(crash)])
    card = run_recipe(_recipe(folder))
    assert card["run"]["resumed_from"] == 4
    expected, found = _weights(folder / "straight" / "last"), _weights(folder / "run" / "last")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = read_metrics(folder / "straight" / "metrics.jsonl")
    assert rows == read_metrics(folder / "run" / "metrics.jsonl")
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"]
    assert card["data"][0]["documents"] == 42 - 4, "a tenth is held out"
    # Negative control: without noise it is another run.
    run_recipe(_recipe(folder, out=str(folder / "other"), objective="sft"))
    assert not torch.equal(_weights(folder / "other" / "last")["embed.weight"], expected["embed.weight"])


def _prepare(folder, **changes):
    made = prepare_records(str(folder / "talks.jsonl"), chat_tokenizer(), folder / "made", RecordSettings(**{"length": 64, **changes}))
    stores = {split: open_shards(folder / "made", split) for split in made.manifest.splits}
    return made, stores


def test_shards_hold_every_record_with_its_mask(folder):
    made, stores = _prepare(folder, valid=0.25)
    expected = sorted(
        (text.ids, text.trained)
        for text in (RecordEncoder(chat_tokenizer(), 64).conversation(Conversation(talk, "")) for talk in TALKS * 6)
    )
    found = []
    for store in stores.values():
        for index in range(store.num_documents):
            places = torch.arange(*store.document(index)).numpy()
            found.append((tuple(store.tokens_at(places).tolist()), tuple(store.trained_at(places).tolist())))
    assert sorted(found) == expected
    assert [store.num_documents for store in stores.values()] == [32, 10]
    assert _prepare(folder, valid=0.25)[0].reused
    assert not _prepare(folder, valid=0.25, length=65)[0].reused
    assert made.manifest.total("train", "trained_tokens") == sum(sum(mask) for _, mask in found) - made.manifest.total(
        "valid", "trained_tokens"
    )


def test_wrong_records_stop_the_run_or_are_left_out_with_their_reasons(folder):
    with open(folder / "talks.jsonl", "a") as file:
        file.write('{"messages": []}\n{"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]}\n')
    with pytest.raises(UserError, match=r"talks\.jsonl:43: column 'messages' is an empty list"):
        _prepare(folder)
    assert not (folder / "made").exists()
    made, _ = _prepare(folder, drop_bad=True)
    assert sum(made.manifest.total(split, "documents") for split in ("train", "valid")) == 42
    why = why_dropped(folder / "made")
    assert len(why) == 2
    assert "spells out the special token" in why[1]
    data = {"sources": [str(folder / "talks.jsonl")], "drop_bad": True}
    card = run_recipe(_recipe(folder, data=data, steps=1))
    assert card["run"]["records_dropped"] == 2


def test_a_teacher_reads_the_same_records(folder):
    run_recipe(_recipe(folder, steps=1))
    objective = {"type": "distill", "teacher": str(folder / "run" / "last")}
    card = run_recipe(_recipe(folder, steps=2, objective=objective, out=str(folder / "student")))
    assert card["data"][0]["documents"] == 38
    targets = [[row["targets"] for row in read_metrics(folder / out / "metrics.jsonl") if "targets" in row] for out in ("run", "student")]
    assert targets[0][0] == targets[1][0], "the same answers of the same rows"
    assert targets[1][0] < 4 * 63 / 2, "negative control: the rows hold more than answers"


def test_a_model_without_a_chat_template_is_given_one_and_keeps_it(folder):
    chat_tokenizer(None).save(folder / "base")
    arguments = {"tokenizer": str(folder / "base"), "steps": 1}
    with pytest.raises(UserError, match=r"talks\.jsonl:1: the record is made of messages, but .* \(data.chat_template: plain\)"):
        run_recipe(_recipe(folder, **arguments))
    data = {"sources": [str(folder / "talks.jsonl")], "chat_template": "plain"}
    run_recipe(_recipe(folder, data=data, **arguments))
    saved = load_tokenizer(folder / "run" / "last")
    assert saved.render_chat(TALK[:1]) == "### User:\nWhat is two plus two?\n\n### Assistant:\n"


def test_a_file_of_held_out_records_is_evaluated_on(folder):
    write(folder / "held.jsonl", [{"prompt": "the cat", "completion": " sat"}])
    _, stores = _prepare(folder, held_out=str(folder / "held.jsonl"))
    assert {split: store.num_documents for split, store in stores.items()} == {"train": 42, "valid": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sources": ["talks.jsonl"], "packing": "stream"}}, "data.packing is stream, which reads over the ends of records"),
        ({"objective": {"type": "sft", "neftun": 5}}, "Did you mean 'neftune'"),
        ({"data": "none.jsonl"}, "there is no data at none.jsonl"),
        ({"batch": {"rows": 4, "length": 8}}, r"talks\.jsonl:\d+: what is trained on begins at token \d+, beyond the length of 9"),
    ],
)
def test_what_cannot_be_is_one_sentence(folder, monkeypatch, changes, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        run_recipe(_recipe(folder, **changes))
    assert not (folder / "run" / "last").exists()
