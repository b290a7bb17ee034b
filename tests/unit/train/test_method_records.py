"""What methods make of records: those that are left out are counted, and pairs that teach nothing are refused."""

import json

import online_cases as online
import pytest
import torch

from record_cases import CHATML, chat_tokenizer, write
from weft.errors import UserError
from weft.train.assemble import open_job, run_recipe
from weft.train.parallel import World
from weft.train.plan import make_plan
from weft.train.recipe import recipe
from weft.weights.save import save_model

SAID = [{"prompt": f"say {n}:", "completion": str(n)} for n in range(8)]
PAIRS = [{"prompt": f"say {n}:", "chosen": str(n), "rejected": "no"} for n in range(8)]
LABELLED = [{"text": f"text {n}", "label": "odd" if n % 2 else "even"} for n in range(8)]
# Of each kind, rows that are read, one that is wrong as a row, and one that is wrong as a text: it spells out the end token.
WRONG_TEXTS = (SAID, {"prompt": "", "completion": "a"}, {"prompt": "a", "completion": "</s>"})
WRONG_PAIRS = (PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "</s>", "rejected": "b"})
WRONG_PROMPTS = ([{"prompt": row["prompt"]} for row in SAID], {"prompt": ""}, {"prompt": "</s>"}, {"prompt": "too long " * 9})
ONLINE = {"rewards": {"length": {"most": 3}}, "max_tokens": 6}
KINDS = {
    "sft": ({"type": "sft"}, WRONG_TEXTS),
    "distill": ({"type": "distill"}, WRONG_TEXTS),
    "distill on policy": ({"type": "distill", "alpha": 1.0, "on_policy": 0.5, "max_tokens": 6}, WRONG_TEXTS),
    "classify": ({"type": "classify"}, (LABELLED, {"text": "", "label": "odd"}, {"text": "</s>", "label": "odd"})),
    "reward": ({"type": "reward"}, WRONG_PAIRS),
    "dpo": ({"type": "dpo"}, WRONG_PAIRS),
    "ppo": ({"type": "ppo", "critic": {"model": "policy"}, **ONLINE}, WRONG_PROMPTS),
    "grpo": ({"type": "grpo", "samples": 2, **ONLINE}, WRONG_PROMPTS),
    "rejection": ({"type": "rejection", "samples": 2, **ONLINE}, WRONG_PROMPTS),
}


def opened(given, **changes):
    return open_job(make_plan(recipe({**given, "dtype": "float32", **changes})), None, World())


def recipe_of(folder, objective, rows, **data):
    """A recipe on rows in a file of their own."""
    made = online.write_run(folder)
    if objective["type"] == "distill":
        save_model(online.policy_of(3, torch.float32), folder / "teacher", online.load_tokenizer(folder / "tok"))
        objective = {**objective, "teacher": str(folder / "teacher")}
    source = write(folder / "rows.jsonl", rows)
    return {**made, "objective": objective, "data": {"sources": [str(source)], "valid": 0.2, **data}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_says_how_many_records_were_left_out(tmp_path, kind):
    objective, (rows, *wrong) = KINDS[kind]
    data = recipe_of(tmp_path, objective, [*rows, *wrong], drop_bad=True)
    assert opened(data).facts["records_dropped"] == len(wrong)
    with pytest.raises(UserError, match=r"rows.jsonl:9"):
        opened(data, data={**data["data"], "drop_bad": False})
    write(tmp_path / "rows.jsonl", rows)
    assert opened(data).facts["records_dropped"] == 0
    assert "records_dropped" not in opened(data, data={**data["data"], "drop_bad": False}).facts


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_data_of_a_stage_is_counted_and_what_stages_share_is_counted_once(tmp_path, kind):
    objective, (rows, *wrong) = KINDS[kind]
    data = recipe_of(tmp_path, objective, [*rows, *wrong], drop_bad=True)
    assert opened(data, stages=[{}, {}]).facts["records_dropped"] == len(wrong)
    other = write(tmp_path / "other.jsonl", [*rows, wrong[0]])
    own = {"sources": [str(other)], "drop_bad": True}
    assert opened(data, stages=[{}, {"data": own}]).facts["records_dropped"] == len(wrong) + 1
    write(tmp_path / "rows.jsonl", rows)
    strict = {**data["data"], "drop_bad": False}
    assert opened(data, data=strict, stages=[{}, {"data": own}]).facts["records_dropped"] == 1


def test_the_count_is_in_the_card_of_a_run(tmp_path):
    objective, (rows, *wrong) = KINDS["dpo"]
    run_recipe(recipe(recipe_of(tmp_path, objective, [*rows, *wrong], drop_bad=True) | {"steps": 1}))
    assert json.loads((tmp_path / "run/run.json").read_text())["run"]["records_dropped"] == 2


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_pair_that_differs_only_behind_the_cut_is_refused(tmp_path, kind):
    rows = [*PAIRS, {"prompt": "a", "chosen": "b" * 30 + "c", "rejected": "b" * 30 + "d"}]
    data = recipe_of(tmp_path, {"type": kind}, rows)
    with pytest.raises(UserError, match=r"rows.jsonl:9: chosen and rejected are the same as far as they are read; raise batch.length"):
        opened(data)
    assert opened(data, batch={"rows": 4, "length": 40}).batches.batch(0).num_rows, "control: with room for the difference"


@pytest.mark.parametrize("empty", ["chosen", "rejected"])
def test_a_pair_of_which_only_format_would_be_scored_is_refused(tmp_path, empty):
    """An answer that is a call of a tool, which this template leaves out, is nothing but the template's end token."""
    asked = [{"role": "user", "content": "a"}]
    answers = {name: [{"role": "assistant", "content": "b"}] for name in ("chosen", "rejected")}
    answers[empty] = [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    rows = [{"prompt": asked, **answers}] * 4
    data = recipe_of(tmp_path, {"type": "dpo", "mask_format": True}, rows)
    chat_tokenizer(CHATML.replace("message['content']", "(message['content'] or '')")).save(tmp_path / "chat")
    given = {"tokenizer": str(tmp_path / "chat"), "batch": {"rows": 2, "length": 64}}
    with pytest.raises(UserError, match=rf"rows.jsonl:1: nothing of {empty} is scored but the template's own tokens; drop the pair"):
        opened(data, **given)
    assert opened(data, **given, objective={"type": "dpo"}).batches.batch(0).num_rows, "control: the end token counts"


def test_tools_are_part_of_a_prompt_to_be_answered_and_to_be_judged(tmp_path):
    asked = [{"role": "user", "content": "a"}]
    template = "{% if tools %}{{ '<|im_start|>' + tools[0]['name'] + '<|im_end|>' }}{% endif %}" + CHATML
    given = {"tokenizer": str(tmp_path / "chat"), "batch": {"rows": 2, "length": 64}}
    rows = [{"prompt": asked, "tools": [{"name": name}]} for name in ("add", "subtract")] * 2
    data = recipe_of(tmp_path, KINDS["grpo"][0], rows, drop_bad=False)
    chat_tokenizer(template).save(tmp_path / "chat")
    job = opened(data, **given)
    read = {job.tokenizer.decode(list(example.ids), skip_special=False).split("<|im_end|>")[0] for example in job.batches.examples}
    assert read == {"<|im_start|>add", "<|im_start|>subtract"}
    answers = {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}
    write(tmp_path / "rows.jsonl", [{**row, **answers} for row in rows])
    batches = opened(data, **given, objective={"type": "reward"}, data={**data["data"], "valid": 0}).batches
    assert len(batches.examples) == 2, "pairs of one prompt are one example, and other tools are another prompt"
