"""Whole runs of online objectives from recipes: what they leave behind, resuming, and what is refused."""

import json

import online_cases as online
import pytest
import torch
import yaml

from weft.errors import UserError
from weft.train.assemble import open_job, run_recipe
from weft.train.callbacks import Callback
from weft.train.history import read_metrics
from weft.train.parallel import World
from weft.train.plan import make_plan
from weft.train.recipe import recipe
from weft.train.rollout import Rollouts
from weft.weights.load import load_model
from weft.weights.save import save_model


class Stop(Exception):
    """Stands for a crash."""


class CrashAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_log(self, rows, pace):
        if pace.step == self.step:
            raise Stop


KINDS = {
    "ppo": {
        "type": "ppo",
        "critic": {"model": "policy", "optim": {"lr": 3e-3}},
        "samples": 2,
        "target": 0.01,
        "epochs": 1,
        "minibatches": 2,
    },
    "grpo": {"type": "grpo", "samples": 3, "epochs": 2},
    "rejection": {"type": "rejection", "samples": 3},
}


def run(data, *callbacks, **changes):
    return run_recipe(
        recipe({**data, "dtype": "float32", "save": {"every": 1}, "log": {"plot": False, "every": 1}, **changes}), callbacks=callbacks
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_crashed_is_the_run_that_did_not(tmp_path, kind):
    data = online.write_run(tmp_path, **KINDS[kind])
    straight, crashed = tmp_path / "straight", tmp_path / "crashed"
    card = run(data, out=str(straight))
    assert card["status"] == "finished"
    for step in (1, 2):
        with pytest.raises(Stop):
            run(data, CrashAfter(step), out=str(crashed))
    run(data, out=str(crashed))
    assert read_metrics(crashed / "metrics.jsonl") == read_metrics(straight / "metrics.jsonl")
    for name in (
        ("model.safetensors", "critic/model.safetensors", "optimizer/model.safetensors") if kind == "ppo" else ("model.safetensors",)
    ):
        assert (crashed / "last" / name).read_bytes() == (straight / "last" / name).read_bytes(), name
    saved = [json.loads((out / "last/trainer.json").read_text())["state"]["objective"] for out in (straight, crashed)]
    assert saved[0] == saved[1]
    assert set(saved[0]) == {"unfinished", "ended"} | ({"beta"} if kind == "ppo" else set())
    rows = read_metrics(straight / "metrics.jsonl")
    held_out = [row for row in rows if "valid_reward" in row]
    assert [row["step"] for row in held_out] == [0, 2, 3]
    assert all(row["valid_loss"] == -row["valid_reward"] for row in held_out)
    assert card["best"]["loss"] == min(row["valid_loss"] for row in held_out)
    if kind == "ppo":
        betas = [row["beta"] for row in rows if "beta" in row]
        assert len(betas) == 3 * 2
        assert betas[0] == pytest.approx(0.05)
        assert len(set(betas)) > 1
    if kind != "grpo":
        return
    # Negative control: with another seed the answers are others.
    other = tmp_path / "other"
    run(data, out=str(other), seed=1)
    assert read_metrics(other / "metrics.jsonl") != rows


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_what_is_not_read_is_kept_and_the_run_goes_on(tmp_path, kind):
    """The modules that look ahead, and a critic's own head."""
    data = online.write_run(tmp_path, **KINDS[kind])
    data["model"] |= {"tie_embeddings": False, "mtp": {"depth": 1}}
    straight, crashed = tmp_path / "straight", tmp_path / "crashed"
    run(data, out=str(straight), steps=2)
    with pytest.raises(Stop):
        run(data, CrashAfter(2), out=str(crashed), steps=2)
    run(data, out=str(crashed), steps=2)
    assert read_metrics(crashed / "metrics.jsonl") == read_metrics(straight / "metrics.jsonl")
    assert (crashed / "last/optimizer/model.safetensors").read_bytes() == (straight / "last/optimizer/model.safetensors").read_bytes()
    fresh = open_job(make_plan(recipe(data)), None, World()).models
    for role, unread in (("policy", {"mtp"}), ("critic", {"head", "mtp"})) if kind == "ppo" else (("policy", {"mtp"}),):
        after = load_model(straight / "last" / ("" if role == "policy" else role)).model.state_dict()
        kept = {name.partition(".")[0] for name, tensor in fresh[role].state_dict().items() if torch.equal(after[name], tensor)}
        assert kept == unread, role


def test_ppo_with_a_reward_model_and_other_text(tmp_path):
    data = online.write_run(tmp_path, **KINDS["ppo"], rewards={})
    tokenizer = online.load_tokenizer(tmp_path / "tok")
    save_model(online.scorer_of(5, torch.float32), tmp_path / "judge", tokenizer)
    (tmp_path / "text.txt").write_text("\n".join(f"line {number} of a text" for number in range(200)))
    objective = data["objective"] | {"reward": str(tmp_path / "judge"), "critic": {"model": "reward"}}
    objective |= {"pretrain": {"data": {"sources": [str(tmp_path / "text.txt")], "valid": 0}, "weight": 0.5, "rows": 2}}
    card = run(data, objective=objective, batch={"rows": 4, "length": 24, "micro": 3})
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "policy" in row]
    assert card["status"] == "finished"
    assert all(row["pretrain"] > 1 for row in rows)
    assert all(abs(row["loss"] - (row["policy"] + 0.5 * row["value"] + 0.5 * row["pretrain"])) < 1e-5 for row in rows)
    critic = load_model(tmp_path / "run/last/critic").model
    assert critic.spec.score == 1
    assert load_model(tmp_path / "run/last").model.spec.score is None
    before = load_model(tmp_path / "judge").model
    assert not torch.equal(critic.score.weight, before.score.weight)


def test_a_policy_with_an_adapter_is_its_own_reference(tmp_path):
    data = online.write_run(tmp_path, **KINDS["grpo"])
    tokenizer = online.load_tokenizer(tmp_path / "tok")
    save_model(online.policy_of(3, torch.float32), tmp_path / "base", tokenizer)
    run(data, model=str(tmp_path / "base"), adapter={"type": "lora", "rank": 2})
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "kl" in row]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": {"max_tokens": 24}}, "objective.max_tokens is 24, but a row has 24 tokens"),
        (
            {"objective": {"max_tokens": 20}},
            r"prompts.jsonl:1: the prompt has \d+ tokens, and 20 of a row's 24 are for the answer \(20 of 20 prompts",
        ),
        ({"compile": True}, "compile is true, but the answers of every step have another shape"),
        ({"objective": {"rewards": {}}}, "neither reward nor rewards is given"),
        ({"objective": {"rewards": {"gsm": 1}}}, "unknown reward 'gsm'. Did you mean 'gsm8k'"),
        ({"objective": {"rewards": {"nowhere.py:score": 1}}}, "there is no file nowhere.py"),
        ({"objective": {"minibatches": 13}}, "objective.minibatches is 13, but a step has 12 answers"),
        ({"objective": {"reward": "BASE"}}, "which is no reward model: it has no score head"),
        ({"objective": {"reference": "BASE2"}}, "whose tokenizer is another one"),
        ({"objective": {"samples": 1}}, "samples"),
        ({"objective": {"type": "ppo"}}, "critic.model is reward, but no reward model is given"),
        ({"objective": {"type": "rejection", "keep": 3}}, "keep is 3 of 3 samples"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, changes, sentence):
    data = online.write_run(tmp_path, type="grpo", samples=3)
    tokenizer = online.load_tokenizer(tmp_path / "tok")
    save_model(online.policy_of(3, torch.float32), tmp_path / "BASE", tokenizer)
    if "reference" in changes.get("objective", {}):
        save_model(online.policy_of(3, torch.float32, vocab=600), tmp_path / "BASE2", other_tokenizer(tmp_path))
    named = {key: str(tmp_path / value) if str(value).startswith("BASE") else value for key, value in changes.get("objective", {}).items()}
    with pytest.raises(UserError, match=sentence):
        run(data, **{**changes, "objective": data["objective"] | named})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_each_of_several_processes_needs_an_answer_a_minibatch(tmp_path, kind):
    data = online.write_run(tmp_path, **{**KINDS[kind], "samples": 2, "minibatches": 4})
    plan = make_plan(recipe(data))
    open_job(plan, None, World())
    with pytest.raises(UserError, match="minibatches is 4, but a step has 2 answers on each of 4 processes; lower it"):
        open_job(plan, None, World(0, 4))


def test_answers_that_never_end_stop_a_run_of_small_batches_resumed_or_not(tmp_path):
    data = online.write_run(tmp_path, **{**KINDS["ppo"], "samples": 1, "minibatches": 1, "unfinished": "penalise", "max_tokens": 1})
    data |= {"data": {**data["data"], "valid": 0}, "steps": 5, "batch": {"rows": 3, "length": 24}}
    sentence = "not one of the last 9 answers up to step 3 ended within 1 tokens"
    for out, before in (("straight", None), ("crashed", 2)):
        data["out"] = str(tmp_path / out)
        if before is not None:
            with pytest.raises(Stop):
                run(data, CrashAfter(before))
        with pytest.raises(UserError, match=sentence):
            run(data)
        saved = json.loads((tmp_path / out / "last/trainer.json").read_text())["state"]
        assert (saved["step"], saved["objective"]["unfinished"], saved["objective"]["ended"]) == (2, 6, False)
    data["objective"] = {**data["objective"], "unfinished": "keep"}
    assert run(data, out=str(tmp_path / "kept"))["status"] == "finished"


def other_tokenizer(folder):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "say": 1, "<u>": 2}, unk_token="<u>"))
    (folder / "words").mkdir()
    made.save(str(folder / "words/tokenizer.json"))
    (folder / "words/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return online.load_tokenizer(folder / "words")


def test_prompts_too_long_are_left_out_where_the_recipe_says_so(tmp_path):
    data = online.write_run(tmp_path, type="rejection", samples=2)
    path = tmp_path / "prompts.jsonl"
    path.write_text(path.read_text() + json.dumps({"prompt": "say " * 20, "answer": ""}) + "\n")
    with pytest.raises(
        UserError, match=r"prompts.jsonl:21: .* \(1 of 21 prompts are too long\); .* data: {sources: \[FILE\], drop_bad: true}"
    ):
        run(data, steps=1)
    run(data | {"data": data["data"] | {"drop_bad": True}}, steps=1)
    card = json.loads((tmp_path / "run/run.json").read_text())
    assert card["data"][0]["documents"] == 16  # of 20, a fifth is held out


def test_a_reward_that_is_no_number_stops_the_run_by_name(tmp_path):
    data = online.write_run(tmp_path, type="grpo", samples=3)
    (tmp_path / "judge.py").write_text("def score(answer):\n    return float('nan')\n")
    with pytest.raises(UserError, match=r"prompts.jsonl:\d+: the reward .*judge.py:score gave nan"):
        run(data)


def test_a_run_does_not_go_on_under_another_judge(tmp_path):
    data = online.write_run(tmp_path, type="rejection", samples=2)
    with pytest.raises(Stop):
        run(data, CrashAfter(1))
    judge = tmp_path / "judge.py"
    judge.write_text(judge.read_text() + "# changed\n")
    with pytest.raises(UserError, match=r"holds a run on other data: .*judges.*judge.py was"):
        run(data)


def test_the_mean_of_checkpoints_writes_its_own_answers(tmp_path, monkeypatch):
    writers, sample = [], Rollouts.sample

    def watched(self, prompts, seeds, n=1):
        writers.append(self.models["policy"].embed.weight.detach().clone())
        return sample(self, prompts, seeds, n)

    monkeypatch.setattr(Rollouts, "sample", watched)
    data = online.write_run(tmp_path, type="rejection", samples=2)
    run(data, average={"count": 2, "over": 1.0})
    mean = load_model(tmp_path / "run" / "average").model
    assert torch.equal(writers[-1], mean.embed.weight)
    assert not torch.equal(writers[-2], mean.embed.weight), "control"


@pytest.mark.parametrize(("kind", "drops"), [("ppo", False), ("grpo", False), ("rejection", True)])
def test_where_ratios_count_nothing_is_dropped(tmp_path, kind, drops):
    data = online.write_run(tmp_path, **KINDS[kind])
    model = {**data["model"], "vocab": online.VOCAB, "dropout": {"embed": 0.5, "attention": 0.5, "residual": 0.5}}
    job = open_job(make_plan(recipe({**data, "model": model})), None, World())
    tokens = torch.arange(12)[None] + 40
    assert set(job.trained) == ({"policy", "critic"} if kind == "ppo" else {"policy"})
    for trained in job.trained.values():
        with torch.no_grad():
            assert torch.equal(trained.train()(tokens).hidden, trained.eval()(tokens).hidden) == (not drops)


def test_gsm8k_as_it_is_published(tmp_path):
    data = online.write_run(tmp_path, type="grpo", samples=3)
    rows = [{"question": f"{n} and 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(12)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = data["objective"] | {"rewards": {"gsm8k": 1.0, "length": {"most": 3, "weight": 0.1}}}
    sources = {"sources": [str(tmp_path / "gsm8k.jsonl")], "valid": 0.25, "chat_template": "plain"}
    run(data | {"data": sources}, objective=objective, steps=1, batch={"rows": 2, "length": 96})
    row = next(row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "policy" in row)
    assert 0 <= row["reward_gsm8k"] <= 1
    assert 1 < row["length"] <= 6
    assert row["reward"] == pytest.approx(row["reward_gsm8k"] + 0.1 * row["reward_length"], abs=1e-6)


def test_the_recipe_of_an_online_run_reads_back(tmp_path):
    read = recipe(online.write_run(tmp_path, **KINDS["ppo"]))
    assert recipe(yaml.safe_load(read.to_yaml())) == read


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rewarded_is_written_more_often(tmp_path, kind):
    data = online.write_run(tmp_path, **{**KINDS[kind], "samples": 8, "target": None, "epochs": 2} if kind == "ppo" else KINDS[kind])
    (tmp_path / "judge.py").write_text("def score(answer):\n    return sum(c in 'aeiou ' for c in answer.text) / 6\n")
    objective = {key: value for key, value in data["objective"].items() if value is not None} | {"samples": 8}
    run(data, objective=objective, steps=16, optim={"lr": 2e-2, "schedule": "constant"}, eval={"every": 16}, save={})
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "reward" in row]
    part = len(rewards) // 3
    assert sum(rewards[-part:]) > 1.5 * sum(rewards[:part])
