"""What is shown: commands that can be typed, tables in order, a picture that is one."""

import numpy as np
import pytest

from weft.quickstart.judge import ParseShare
from weft.quickstart.pairs import Pair
from weft.quickstart.picture import Curve, Shares, draw, smooth
from weft.quickstart.report import bits_table, next_commands, share_facts, stages_table
from weft.quickstart.sampling import choose_prompts, take_beginnings
from weft.quickstart.settings import Judging, Settings

BASELINES = {"gzip": 2.0, "byte_5gram": 1.9, "xz": 1.7, "xz_given_training": 1.45}


def test_the_table_goes_from_the_most_expensive_to_the_cheapest():
    report = {"baselines": BASELINES, "bits_per_byte": 1.6, "model": {"parameters": 5_000_000}}
    values = [value for _, value in bits_table(report)]
    assert values == [2.0, 1.9, 1.7, 1.6, 1.45]
    assert bits_table(report)[3][0] == "this model, 5,000,000 parameters"


def test_the_stages_stand_side_by_side():
    shares = {"before": ParseShare(3, 5, 8), "after": ParseShare(4, 8, 8, 3, 10, 2, 9), "reinforced": ParseShare(6, 8, 8, 6, 8, 6, 12)}
    report = {
        "parse_share": {stage: share_facts(share) for stage, share in shares.items()},
        "bits_per_byte": 1.5,
        "bits_per_byte_fine_tuned": 1.6,
        "bits_per_byte_reinforced": 1.7,
        "reinforcement": {"kl": 3.21},
    }
    heads, rows = stages_table(report)
    assert heads == ["pretrained", "fine-tuned", "reinforced"]
    assert rows[0] == ["sampled functions that parse", "38% (14 to 69%)", "50% (22 to 78%)", "75% (41 to 93%)"]
    assert [row[1:] for row in rows[1:]] == [
        ["0%", "75%", "100%"],
        ["0%", "20%", "75%"],
        ["0.0", "2.2", "2.0"],
        ["1.500", "1.600", "1.700"],
        ["", "0", "3.2"],
    ]
    two = {**report, "parse_share": {stage: report["parse_share"][stage] for stage in ("before", "after")}}
    assert stages_table(two)[0] == ["pretrained", "fine-tuned"]
    assert all(len(row) == 3 for row in stages_table(two)[1])
    assert stages_table({"parse_share": {}}) == ([], [])


def test_next_commands_are_quoted_for_a_shell():
    report = {"out": "my runs/it's", "corpus": {"kind": "text"}, "corpus_folder": "my texts"}
    commands = next_commands(report)
    assert commands[0] == """weft generate 'my runs/it'"'"'s/model' -p 'The ' --temp 0.7"""
    assert "--corpus 'my texts'" in commands[2]


@pytest.mark.parametrize("shares", [None, Shares((0, 5), 8), Shares((0, 5, 8), 8)])
@pytest.mark.parametrize("curve", [Curve([], []), Curve([1.0], [3.0]), Curve(range(1, 99), np.linspace(8, 1.5, 98).tolist(), [50], [2])])
def test_the_picture_is_a_png_whatever_there_is_to_show(shares, curve):
    pytest.importorskip("matplotlib")
    picture = draw("Title", curve, 1.6, {"gzip -9": 2.0, "xz -9": 1.7}, shares)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 10_000


def test_smoothing_is_a_centred_mean():
    values = np.array([1.0, 2, 6, 4, 5, 9, 1])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3, 4, 5, 6, 5, 5])
    np.testing.assert_allclose(smooth(values, 1), values)


def test_prompts_are_short_distinct_and_always_the_same_ones():
    pairs = [Pair(f"m.py:{i}", f"def f{i % 30}():\n    '''{'x' * i}'''", "\n    pass\n") for i in range(400)]
    settings = Settings(judging=Judging(samples=20, max_prompt=200))
    prompts = choose_prompts(pairs, settings)
    assert len(prompts) == len(set(prompts)) == 20
    assert all(len(prompt) <= 200 for prompt in prompts)
    assert choose_prompts(pairs[::-1], settings) == prompts
    assert set(choose_prompts([pair for pair in pairs if pair.prompt != prompts[0]], settings)) > set(prompts[1:])


def test_beginnings_are_words_of_the_text_or_nothing():
    text = "".join(f"line {i} of a text with some words in it and more\n" for i in range(99))
    beginnings = take_beginnings(text)
    assert len(beginnings) == 3
    assert all(beginning in text and beginning.startswith("line") for beginning in beginnings)
    assert take_beginnings(" \n \n") == []
