"""Recipes of classification, reward models, DPO and distillation: from files of records to a model folder, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paths import ROOT
from system.train_runs import MODEL, RECIPE, make_inputs
from weft.data.lessons import LessonBatches, given_texts, is_drawn
from weft.data.prompts import collate
from weft.data.record_kinds import Labelled
from weft.errors import UserError
from weft.methods import Place
from weft.methods.classify import classes_of, numbers_of
from weft.methods.frozen import open_frozen
from weft.nn import build
from weft.nn.adapters import adapters_off
from weft.spec import ModelSpec, model_spec
from weft.tokenizer import load_tokenizer
from weft.train.assemble import open_job, run_recipe
from weft.train.callbacks import Callback
from weft.train.parallel import World
from weft.train.plan import make_plan
from weft.train.recipe import override, read_recipe, recipe
from weft.weights.load import load_model
from weft.weights.save import save_model

PLAIN = {**MODEL, "dropout": {}}
WORDS = ("loom", "weft", "warp", "thread", "shuttle")
OBJECTIVES = {
    "classify": ("texts.tsv", "classify"),
    "reward": ("pairs.jsonl", {"type": "reward", "centre": 0.01}),
    "dpo": ("pairs.jsonl", {"type": "dpo", "nll": 0.1}),
    "distill": ("text.txt", {"type": "distill", "teacher": "teacher/last", "temperature": 2.0}),
}


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, rows, pace):
        if rows and rows[-1]["step"] == self.step:
            raise Killed


def train(place: Path, out: str, *overrides: str, callbacks=(), **settings):
    base = {**RECIPE, "model": PLAIN, "tokenizer": str(place / "tok"), "out": str(place / out), "steps": 6, "eval": {"every": 3}}
    return run_recipe(recipe(override({**base, **settings}, overrides)), False, callbacks)


def run(place: Path, kind: str, out: str, *overrides: str, callbacks=(), **settings):
    """One of the four, from the model in `base`."""
    file, objective = OBJECTIVES[kind]
    if kind == "distill":
        objective = {**objective, "teacher": str(place / objective["teacher"])}
    given = {"model": str(place / "base" / "last"), "data": str(place / file), "objective": objective, "optim": {"lr": 1e-2}}
    return train(place, out, *overrides, callbacks=callbacks, **{**given, **settings})


def opened(place: Path, **settings):
    """A job on pairs that is not run."""
    given = {**RECIPE, "model": str(place / "base" / "last"), "tokenizer": str(place / "tok"), "data": str(place / "pairs.jsonl")}
    return open_job(make_plan(recipe({**given, "out": str(place / "unused"), **settings})), None, World())


@pytest.fixture(scope="module", autouse=True)
def _no_measuring():
    """A third of a second that every run takes to measure the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.train.report.matmul_peak", lambda *_: 1e10)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with records, a tokenizer, and two models that were trained for a moment."""
    folder = tmp_path_factory.mktemp("offline")
    make_inputs(folder)
    texts = [(f"{WORDS[i % 5]} {WORDS[i % 3]}", "glad" if i % 2 else "sad") for i in range(40)]
    (folder / "texts.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in texts))
    pairs = [{"prompt": f"{i // 2} ", "chosen": WORDS[i // 2 % 4], "rejected": WORDS[i % 3] + "s"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train(folder, "base", data=str(folder / "text.txt"), steps=2)
    train(folder, "teacher", data=str(folder / "text.txt"), steps=2, model={**PLAIN, "dim": 32}, seed=5)
    return folder


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_run_ends_with_a_model_and_goes_on_bit_for_bit(kind, place):
    assert run(place, kind, kind)["status"] == "finished"
    rows = logged(place / kind)
    valid = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert valid[-1] < valid[0]
    if kind != "distill":
        assert {"accuracy", "valid_accuracy"} <= {name for row in rows for name in row}
    with pytest.raises(Killed):
        run(place, kind, f"{kind} killed", callbacks=[KillAt(5)])
    run(place, kind, f"{kind} killed")
    for name in ("last/model.safetensors", "last/optimizer/model.safetensors", "metrics.jsonl"):
        assert (place / kind / name).read_bytes() == (place / f"{kind} killed" / name).read_bytes(), name
    run(place, kind, f"{kind} other", seed=1)
    assert (place / kind / "metrics.jsonl").read_bytes() != (place / f"{kind} other" / "metrics.jsonl").read_bytes()


UNREAD = {
    "next_token": ("text.txt", {"type": "next_token", "mtp": 0}, {"score", "mtp"}),
    "mtp": ("text.txt", "next_token", {"score"}),
    "sft": ("talks.jsonl", "sft", {"score", "mtp"}),
    "classify": ("texts.tsv", {"type": "classify", "lm": 0}, {"head", "mtp"}),
    "classify, lm": ("texts.tsv", "classify", {"mtp"}),
    "reward": ("pairs.jsonl", "reward", {"head", "mtp"}),
    "dpo": ("pairs.jsonl", "dpo", {"score", "mtp"}),
    "distill": ("text.txt", {"type": "distill", "teacher": "ends"}, {"score", "mtp"}),
}


@pytest.fixture(scope="module")
def ends(place):
    """A model with all that an objective may leave unread: a head of its own, a score head, a module that looks ahead."""
    spec = model_spec({**PLAIN, "vocab": 257, "tie_embeddings": False, "score": 2, "labels": ["glad", "sad"], "mtp": {"depth": 1}})
    save_model(build(spec, seed=4), place / "ends", load_tokenizer(place / "tok"))
    (place / "talks.jsonl").write_text("".join(json.dumps({"prompt": f"{n} ", "completion": WORDS[n % 5]}) + "\n" for n in range(30)))
    return place / "ends"


@pytest.mark.parametrize("kind", UNREAD)
def test_what_an_objective_does_not_read_is_kept_and_the_run_goes_on(kind, place, ends, monkeypatch):
    monkeypatch.chdir(place)
    file, objective, unread = UNREAD[kind]
    given = {"model": "ends", "data": {"sources": [file], "valid": 0.2}, "objective": objective, "optim": {"lr": 1e-2}, "steps": 4}
    straight, killed = f"{kind} ends", f"{kind} ends killed"
    train(place, straight, **given)
    with pytest.raises(Killed):
        train(place, killed, callbacks=[KillAt(4)], **given)
    train(place, killed, **given)
    for name in ("last/model.safetensors", "last/optimizer/model.safetensors", "metrics.jsonl"):
        assert (place / straight / name).read_bytes() == (place / killed / name).read_bytes(), name
    before, after = (load_model(folder).model.state_dict() for folder in (ends, place / straight / "last"))
    kept = {name.partition(".")[0] for name in before if name in after and torch.equal(before[name], after[name])}
    assert kept == unread
    moments = load_file(place / straight / "last/optimizer/model.safetensors")
    assert {name.split(".")[1] for name in moments} == {name.partition(".")[0] for name in after} - unread
    trained = sum(tensor.numel() for name, tensor in after.items() if name.partition(".")[0] not in unread)
    assert json.loads((place / straight / "run.json").read_text())["model"]["trained"] == trained


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_recipe_of_each_runs(kind, place):
    """As its page says: `weft train recipes/NAME.yaml model=… data=… out=… steps=…`."""
    given = {"model": place / "base" / "last", "data": place / OBJECTIVES[kind][0], "out": place / f"{kind} recipe", "steps": 1}
    given |= {"batch.length": 24, "batch.rows": 4, "batch.micro": 2, "tokenizer": place / "tok"}
    if kind == "distill":
        given["objective.teacher"] = place / "teacher" / "last"
    made = read_recipe(ROOT / "recipes" / f"{kind}.yaml", [f"{key}={value}" for key, value in given.items()])
    assert made.objective.type == kind
    card = run_recipe(made, False, ())
    assert card["status"] == "finished"
    assert "valid_loss" in logged(place / f"{kind} recipe")[-1]


def test_what_a_classifier_says_of_itself(place):
    run(place, "classify", "classes", "steps=1")
    spec = load_model(place / "classes" / "last").spec
    assert (spec.score, spec.labels) == (2, ("glad", "sad"))
    config = json.loads((place / "classes" / "last" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "glad", "1": "sad"}
    # Trained further, it keeps its classes and its head.
    run(place, "classify", "further", "steps=1", model=str(place / "classes" / "last"), optim={"lr": 1e-9, "warmup": 0})
    first, second = (load_file(place / name / "last" / "model.safetensors")["score.weight"] for name in ("classes", "further"))
    assert torch.allclose(first, second, atol=1e-6)
    # A label misspelt does not throw the head away; a fresh one, even for the same labels, is asked for.
    (place / "misspelt.tsv").write_text((place / "texts.tsv").read_text().replace("\tsad", "\tsda", 1))
    given = {"model": str(place / "classes" / "last"), "optim": {"lr": 1e-9, "warmup": 0}}
    with pytest.raises(UserError, match=r"misspelt.tsv:2: the label is 'sda', but the model is a classifier .* allowed are glad, sad"):
        run(place, "classify", "misspelt", "steps=1", data=str(place / "misspelt.tsv"), **given)
    new = {"objective": {"type": "classify", "classes": "new"}, "seed": 1}
    run(place, "classify", "fresh", "steps=1", data=str(place / "misspelt.tsv"), **given, **new)
    assert load_model(place / "fresh" / "last").spec.labels == ("glad", "sad", "sda")
    run(place, "classify", "fresh alike", "steps=1", **given, **new)
    other = load_file(place / "fresh alike" / "last" / "model.safetensors")["score.weight"]
    assert not torch.allclose(first, other, atol=1e-6)
    # Labels that are numbers name its classes by their places.
    (place / "numbers.tsv").write_text((place / "texts.tsv").read_text().replace("\tsad", "\t1").replace("\tglad", "\t0"))
    run(place, "classify", "numbers", "steps=1", data=str(place / "numbers.tsv"), **given)
    assert load_model(place / "numbers" / "last").spec.labels == ("glad", "sad")
    losses = [logged(place / out)[0]["valid_loss"] for out in ("further", "numbers")]
    assert losses[0] == losses[1]


def test_a_reference_is_what_training_began_with_or_what_is_named(place):
    before = load_file(place / "base" / "last" / "model.safetensors")
    job = opened(place, objective="dpo")
    assert torch.equal(job.models["reference"].embed.weight, before["model.embed_tokens.weight"])
    assert job.models["reference"].embed.weight is not job.policy.embed.weight
    assert list(job.trained) == ["policy"]
    named = opened(place, objective={"type": "dpo", "reference": str(place / "teacher" / "last")})
    assert named.models["reference"].spec.dim == 32
    assert named.models["reference"].dtype == named.policy.dtype == torch.float32
    run(place, "dpo", "dpo near itself", "steps=1", objective={"type": "dpo", "reference": str(place / "base" / "last")})
    first = next(row["loss"] for row in logged(place / "dpo near itself") if "loss" in row)
    assert abs(first - 0.6931472) < 1e-6, "in bfloat16 too, where a reference of rounded weights would be another model"
    adapted = opened(place, objective="dpo", adapter="lora")
    assert set(adapted.models) == {"policy"}, "a policy with an adapter is its own reference without it"


def test_with_an_adapter_dpo_begins_at_log_two_and_the_head_of_a_reward_model_is_trained(place):
    run(place, "dpo", "dpo lora", "steps=2", adapter="lora", objective="dpo")
    losses = [row["loss"] for row in logged(place / "dpo lora") if "loss" in row]
    assert abs(losses[0] - 0.6931472) < 1e-6
    assert losses[1] != losses[0]
    run(place, "dpo", "dpo recomputed", "steps=2", adapter="lora", objective="dpo", gradient_checkpointing=True)
    assert (place / "dpo recomputed" / "metrics.jsonl").read_bytes() == (place / "dpo lora" / "metrics.jsonl").read_bytes()
    run(place, "reward", "reward lora", "steps=2", adapter="lora")
    head = load_model(place / "reward lora" / "last").model.score.weight
    assert head.shape == (1, 16)
    assert not torch.equal(head, opened(place, objective="reward", adapter="lora").policy.score.weight)


def test_the_reference_of_an_adapter_that_is_trained_further_is_the_adapter_as_it_was(place):
    """Not the base: that is what the first run began with."""
    run(place, "dpo", "first adapter", "steps=2", adapter="lora", objective="dpo")
    given = {"model": str(place / "first adapter" / "last"), "objective": "dpo"}
    job = opened(place, **given)
    tokens = torch.arange(12)[None] + 40
    policy, reference = job.policy.eval(), job.models["reference"]
    with torch.no_grad():
        assert torch.equal(policy(tokens).hidden, reference(tokens).hidden)
        with adapters_off(policy):
            assert not torch.allclose(policy(tokens).hidden, reference(tokens).hidden, atol=1e-6), "control"
    assert reference.embed.weight is policy.embed.weight, "what is frozen is held once"
    theirs = {id(parameter) for parameter in reference.parameters()}
    assert not any(id(parameter) in theirs for parameter in policy.parameters() if parameter.requires_grad)
    run(place, "dpo", "second adapter", "steps=2", dtype="float32", **given)
    losses = [row["loss"] for row in logged(place / "second adapter") if "loss" in row]
    assert abs(losses[0] - 0.6931472) < 1e-6
    assert losses[1] != losses[0]


@pytest.mark.parametrize(("objective", "drops"), [("dpo", False), ("reward", True)])
def test_dropout_would_be_taken_for_a_change_of_the_policy(objective, drops, place):
    """Log-probabilities are compared with the reference's, which are taken at rest."""
    model = {**PLAIN, "vocab": 300, "dropout": {"embed": 0.5, "attention": 0.5, "residual": 0.5}}
    policy = opened(place, model=model, objective=objective).policy
    tokens = torch.arange(12)[None] + 40
    with torch.no_grad():
        assert torch.equal(policy.train()(tokens).hidden, policy.eval()(tokens).hidden) == (not drops)
    assert policy.spec.dropout.embed == 0.5


def test_a_reward_model_in_bfloat16_tells_close_rewards_apart(place):
    run(place, "reward", "judge", "steps=1")
    here = Place(torch.device("cpu"), torch.float32, World(), place, products=torch.bfloat16)
    given = {"model": str(place / "base" / "last"), "tokenizer": str(place / "tok"), "data": str(place / "pairs.jsonl")}
    plan = make_plan(recipe({**RECIPE, **given, "out": str(place / "unused")}))
    model = open_frozen(str(place / "judge" / "last"), "objective.reward", plan, here)
    assert (model.dtype, model.score.weight.dtype) == (torch.bfloat16, torch.float32)
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    scores = model.score(hidden)
    assert not torch.equal(scores, scores.bfloat16().float())


def test_held_out_records_can_be_named(place):
    (place / "held.tsv").write_text("text\tlabel\nloom\tglad\nwarp\tsad\n")
    run(place, "classify", "held", "steps=1", data={"sources": [str(place / "texts.tsv")], "held_out": str(place / "held.tsv")})
    assert json.loads((place / "held" / "run.json").read_text())["data"][0]["documents"] == 40
    (place / "odd.tsv").write_text("text\tlabel\nloom\tglad\nwarp\tcross\n")
    with pytest.raises(UserError, match=r"odd.tsv:3: the label is 'cross', which no text to train on has; allowed are glad, sad"):
        run(place, "classify", "odd", data={"sources": [str(place / "texts.tsv")], "held_out": str(place / "odd.tsv")})


def test_format_tokens_are_left_out_of_the_loss_where_asked(place):
    counts = []
    for masked in (False, True):
        job = opened(place, objective={"type": "dpo", "mask_format": masked})
        texts = job.batches.batch(0).texts
        counts.append((texts.num_targets, int((texts.targets[texts.mask] == job.tokenizer.eos_id).sum())))
    assert counts[0][1] == 12, "an end token an answer"
    assert counts[1] == (counts[0][0] - 12, 0)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("dpo", {"objective": {"type": "dpo", "loss": "ipo", "label_smoothing": 0.1}}, "label_smoothing is 0.1, but the loss is ipo"),
        ("dpo", {"data": "texts.tsv"}, "texts.tsv"),
        ("dpo", {"data": "same.jsonl"}, "same.jsonl:1"),
        ("classify", {"data": "pairs.jsonl"}, "pairs.jsonl"),
        ("classify", {"data": "alike.tsv"}, "alike.tsv:2: the label is 'x' in every record"),
        ("classify", {"data": {"sources": [{"path": "texts.tsv", "weight": 2.0}]}}, "drop the weights"),
        ("distill", {"objective": {"type": "distill", "teacher": "nowhere"}}, "nowhere"),
        ("distill", {"objective": {"type": "distill", "teacher": "stranger"}}, "stranger.*whose tokenizer is another one"),
        ("reward", {"optim": {"lr": 1e30, "clip": None, "warmup": 0}, "steps": 30}, "(loss|gradient) of step .* is (nan|inf)"),
    ],
)
def test_bad_input_is_a_sentence(kind, settings, words, place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "same.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    (place / "alike.tsv").write_text("text\tlabel\none\tx\ntwo\tx\n")
    if not (place / "stranger").exists():
        (place / "more").mkdir()
        make_inputs(place / "more")
        path = place / "more" / "tok" / "tokenizer.json"
        path.write_text(path.read_text().replace('"</s>"', '"<end>"'))
        (place / "more" / "tok" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
        load = {"model": PLAIN, "data": str(place / "text.txt"), "tokenizer": str(place / "more" / "tok"), "steps": 1}
        train(place, "stranger run", **load)
        (place / "stranger run" / "last").rename(place / "stranger")
    with pytest.raises(UserError, match=words):
        run(place, kind, "bad", **settings)


def test_stages_of_a_classifier_share_its_classes(place):
    (place / "other.tsv").write_text("text\tlabel\nloom\tcross\nwarp\tsad\n")
    with pytest.raises(UserError, match="late has data of its own, whose labels could mean other classes"):
        run(place, "classify", "staged", stages=[{}, {"name": "late", "data": str(place / "other.tsv")}])
    assert run(place, "classify", "staged", stages=[{}, {"batch": {"rows": 4, "micro": 2}}])["status"] == "finished"


@pytest.mark.parametrize("kind", ["classify", "dpo"])
def test_where_every_record_is_left_out_the_first_is_named(kind, place):
    row = {"text": "weft </s>", "label": "sad"} if kind == "classify" else {"prompt": "a", "chosen": "b </s>", "rejected": "c"}
    rows = [row, {**row, "label": "glad"}] if kind == "classify" else [row]
    path = place / f"bad {kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"leaves none of the {len(rows)} records. The first: .*jsonl:1: the text spells out"):
        run(place, kind, "none left", data={"sources": [str(path)], "drop_bad": True})


def test_classes_are_sorted_and_checked():
    def records(*labels):
        return [Labelled("text", label, f"file:{i}") for i, label in enumerate(labels, 1)]

    plain = ModelSpec.model_validate({"vocab": 11, "dim": 16, "layers": [{"channel": {"type": "gated", "hidden": 8}}]})
    assert classes_of(plain, records(10, 9, 2, 9)) == ("2", "9", "10")
    assert classes_of(plain, records("b", "a", "b")) == ("a", "b")
    numbered = ModelSpec.model_validate({**plain.model_dump(), "score": 3})
    assert classes_of(numbered, records(2, 0)) == ("0", "1", "2"), "the model's own classes"
    with pytest.raises(
        UserError, match="file:2: the label is 3, but the model is a classifier that has no such class; allowed are 0, 1, 2"
    ):
        classes_of(numbered, records(0, 3))
    named = ModelSpec.model_validate({**numbered.model_dump(), "labels": ("bad", "fair", "good")})
    assert classes_of(named, records("good", "bad")) == ("bad", "fair", "good")
    assert numbers_of(named.labels, records("good", "bad")) == {"bad": 0, "fair": 1, "good": 2}
    misspelt = r"file:2: the label is 'god' \(unknown too: x\), but .* allowed are bad, fair, good\. .* set objective.classes to new"
    with pytest.raises(UserError, match=misspelt):
        classes_of(named, records("good", "god", "bad", "god", "x"))
    assert classes_of(named, records("good", "god", "bad", "god"), new=True) == ("bad", "god", "good")
    # Whole numbers are places among the classes, as in Hugging Face's data, unless a class has a number for its name.
    assert classes_of(named, records(2, 0, 2)) == ("bad", "fair", "good")
    assert numbers_of(named.labels, records(2, 0, 2)) == {"0": 0, "1": 1, "2": 2}
    with pytest.raises(UserError, match="file:1: the label is 3, but"):
        classes_of(named, records(3, 0))
    with pytest.raises(UserError, match="file:2: the label is 0, but"):
        classes_of(named, records("good", 0))
    years = ModelSpec.model_validate({**numbered.model_dump(), "labels": ("1", "2", "5")})
    assert numbers_of(classes_of(years, records(2, 1)), records(2, 1)) == {"1": 0, "2": 1, "5": 2}
    with pytest.raises(UserError, match="file:2: the label is 0, but"):
        classes_of(years, records(2, 0))
    with pytest.raises(UserError, match="file:2: the label is 'x', but others are numbers, such as 1; give all in one form"):
        classes_of(plain, records(1, "x"))
    with pytest.raises(UserError, match="each of 3 records has a label of its own"):
        classes_of(plain, records("a", "b", "c"))


def test_pairs_of_one_prompt_are_one_example_of_a_reward_model_and_several_of_dpo(place):
    rewarded, preferred = (opened(place, objective=objective).batches for objective in ("reward", "dpo"))
    assert len(rewarded.examples) + len(rewarded.valid) == 20
    assert len(preferred.examples) + len(preferred.valid) == 40
    assert {len(example.answers) for example in rewarded.examples} == {3}, "an answer that is in two pairs is read once"
    assert all(len(example.pairs) == 2 for example in rewarded.examples)


def test_a_student_may_write_the_texts_itself(place):
    """On policy: a share of the steps, drawn by their seeds, has the student's own answers; a killed run draws the same again."""
    rows = [{"prompt": f"{WORDS[i % 5]} ", "completion": WORDS[i % 3] + " and more"} for i in range(30)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {"type": "distill", "teacher": str(place / "teacher" / "last"), "alpha": 1.0, "on_policy": 0.5, "max_tokens": 5}
    given = {"data": str(place / "prompts.jsonl"), "objective": {**objective, "divergence": "jsd"}, "optim": {"lr": 1e-2}}
    given |= {"model": str(place / "base" / "last"), "batch": {"rows": 4, "micro": 3}, "seed": 1}
    job, own = opened(place, **given), []
    for step in range(6):
        batch = job.batches.batch(step)
        texts, again = (job.objective.rollout(job.engine, batch) for _ in range(2))
        assert torch.equal(texts.tokens, again.tokens)
        own.append(is_drawn(batch, 0.5))
        assert torch.equal(texts.tokens, given_texts(batch).tokens) != own[-1]
        prompts = sorted(tuple(example.ids) for example in batch.examples)
        assert prompts == sorted(
            tuple(row[: int(mask.nonzero()[0]) + 1].tolist()) for row, mask in zip(texts.tokens, texts.loss_mask, strict=True)
        )
        assert not own[-1] or int(texts.loss_mask.sum(1).max()) <= 5
    assert {True, False} == set(own), "some steps are the student's, some the data's"
    apart = (LessonBatches(job.batches.examples, collate, 4, 10, seed=1, rank=rank, world=2) for rank in range(2))
    assert [[is_drawn(share.batch(step), 0.5) for step in range(6)] for share in apart] == [own, own], "on every process the same"

    train(place, "own", **given)
    valid = [row["valid_loss"] for row in logged(place / "own") if "valid_loss" in row]
    assert valid[-1] < valid[0]
    with pytest.raises(Killed):
        train(place, "own killed", callbacks=[KillAt(5)], **given)
    train(place, "own killed", **given)
    assert (place / "own" / "metrics.jsonl").read_bytes() == (place / "own killed" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"on_policy is 0\.5 and alpha 0\.3"):
        train(place, "bad", **{**given, "objective": {**objective, "alpha": 0.3}})
    with pytest.raises(UserError, match="on_policy needs prompts"):
        train(place, "bad", **{**given, "data": str(place / "text.txt")})
