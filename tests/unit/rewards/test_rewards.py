"""Judges: what each gives for an answer, and sentences for judges that are wrong."""

import math
from decimal import Decimal

import pytest

from weft.errors import UserError
from weft.rewards import REWARDS, Answer, open_judge
from weft.rewards.numbers import final_number
from weft.rewards.python import read_function, take_body

PROMPT = 'def f(a, b=1):\n    """Add."""'


def judged(name, answer, **settings):
    judge = open_judge({name: {"weight": 2.0, **settings}})
    numbers = judge.numbers(answer)
    assert judge.total(numbers) == 2 * numbers[name]
    return numbers[name]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4. #### 4", "4"),
        ("so she has $1,250.50 left", "1250.50"),
        ("#### -3\nThe end of 7 days", "-3"),
        ("\\boxed{12} of 40", "12"),
        ("first 3, then 5", "5"),
        ("it is 20-12", "12"),
        ("it is -12", "-12"),
        ("none at all", None),
        ("#### none", None),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_compares_numbers_not_their_spelling():
    facts = {"answer": "48/2 = <<48/2=24>>24\n#### 1,072"}
    assert judged("gsm8k", Answer("q", "She sold 1072 clips.", facts=facts)) == 1
    assert judged("gsm8k", Answer("q", "#### 1072.0", facts=facts)) == 1
    assert judged("gsm8k", Answer("q", "She sold 1073 clips.", facts=facts)) == 0
    with pytest.raises(UserError, match=r"d:3: the reward gsm8k needs the column 'answer', and the record's other columns are: label"):
        judged("gsm8k", Answer("q", "4", facts={"label": 1}, origin="d:3"))
    with pytest.raises(UserError, match="d:3: the reward gsm8k finds no number"):
        judged("gsm8k", Answer("q", "4", facts={"answer": "many"}, origin="d:3"))


def test_text_judges():
    assert judged("match", Answer("q", " yes\n", facts={"answer": "yes"})) == 1
    assert judged("match", Answer("q", "yes.", facts={"answer": "yes"})) == 0
    assert judged("format", Answer("q", "<a>\nx</a>"), pattern="<a>.*</a>") == 1
    assert judged("format", Answer("q", "<a>\nx</a>!"), pattern="<a>.*</a>") == 0
    assert [judged("length", Answer("q", "x" * size), most=10) for size in (0, 10, 15, 20, 99)] == [1, 1, 0.5, 0, 0]


MESSAGE = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize("fact", ["4", " 4\n", 4, 4.0, (MESSAGE,), [MESSAGE], MESSAGE])
def test_what_a_column_says_is_told_from_its_form(fact):
    facts = {"answer": fact}
    assert judged("match", Answer("q", "4", facts=facts)) == 1
    assert judged("match", Answer("q", "5", facts=facts)) == 0
    assert judged("gsm8k", Answer("q", "it is 4", facts=facts)) == 1
    body = "\n    return a + b\n"
    assert judged("python", Answer(PROMPT, body, facts=facts), like="answer") == 1


def test_numbers_are_told_as_people_write_them():
    for fact, written in ((0.00001, "0.00001"), (-2.5, "-2.5"), (1e16, "10000000000000000")):
        assert judged("match", Answer("q", written, facts={"answer": fact})) == 1
        assert judged("gsm8k", Answer("q", written, facts={"answer": fact})) == 1


@pytest.mark.parametrize(
    ("fact", "kind"),
    [
        (None, "null"),
        (True, "true or false"),
        ([], "a list"),
        ((MESSAGE, MESSAGE), "a list"),
        (["4"], "a list"),
        ({"role": "user", "content": "4"}, "an object"),
        ([{"role": "assistant", "content": None}], "null"),
        (math.nan, "a number"),
    ],
)
@pytest.mark.parametrize(("judge", "settings"), [("match", {}), ("gsm8k", {}), ("python", {"like": "answer"})])
def test_a_column_that_no_answer_can_be_like_is_refused(judge, settings, fact, kind):
    with pytest.raises(UserError, match=f"d:3: the reward {judge} compares with the column 'answer', which is {kind}; give text, a finite"):
        judged(judge, Answer(PROMPT, "\n    return a + b\n", facts={"answer": fact}, origin="d:3"), **settings)


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("\n    return a + b\n", 1.0),
        ("\n    return a + 1\n", 0.75),
        ("\n    return g()\n", 0.5),
        ("\n    return a +\n", 0.0),
        ("\n    pass\n", 0.0),
        ("\n    ...\n", 0.0),
        ("\n    return None\n", 0.0),
        ("\n    return a, b\n", 0.0),
        ("\n    raise NotImplementedError('a')\n", 0.0),
        ("\n    a\n    return\n", 0.0),
        ("\n    a.x = None\n    b = []\n    c, d = 1, 2\n", 0.0),
        ("\n    self.x = None\n    self.y = {}\n    b = b\n    self.z\n", 0.0),
        ("\n    self.x = a\n", 0.75),
        ("\n    pass\n    return a + b\n", 1.0),
        ("\n", 0.0),
        ("\n    return a + b\ndef g(", 1.0),  # what comes after the function does not count
    ],
)
def test_python_functions(body, number):
    assert judged("python", Answer(PROMPT, body)) == number


def test_a_function_that_was_cut_off_is_worth_nothing():
    assert judged("python", Answer(PROMPT, "\n    return a + b", finished=False)) == 0
    assert judged("python", Answer(PROMPT, "\n    return a + b\nclass", finished=False)) == 1  # it had ended before the model went on
    assert judged("python", Answer(({"role": "user", "content": "f"},), "\n    return a + b")) == 0


def test_parameters_that_need_not_be_read():
    assert read_function('def f(self, *args, key, **rest):\n    """Do."""', "\n    return self.x(args, key)\n").share_used == 2 / 3
    assert read_function('async def f():\n    """Do."""', "\n    return g()\n").share_used == 1
    assert read_function('def f(x):\n    """Do."""', "\n    x = 1\n    return g()\n").used == 0
    assert take_body("\n    return 1\n\n\ndef g():\n    pass\n") == ("\n    return 1\n\n\n", True)


def test_a_function_of_the_users_own(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def score(answer):\n    return len(answer.text) / answer.facts.get('by', 1)\nwrong = 3\n")
    assert judged(f"{file}:score", Answer("q", "four", facts={"by": 2})) == 2
    with pytest.raises(UserError, match=r"x:9: the reward .*score failed \(ZeroDivisionError: division by zero\)"):
        judged(f"{file}:score", Answer("q", "four", facts={"by": 0}, origin="x:9"))
    with pytest.raises(UserError, match="has no function wrong"):
        open_judge({f"{file}:wrong": 1.0})
    with pytest.raises(UserError, match="there is no file"):
        open_judge({f"{tmp_path}/none.py:score": 1.0})
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="could not be run"):
        open_judge({f"{file}:score": 1.0})


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_reward_that_is_no_number_is_refused(tmp_path, number):
    file = tmp_path / "judge.py"
    file.write_text(f"def score(answer):\n    return float('{number}')\n")
    with pytest.raises(
        UserError, match=rf"x:9: the reward .*score gave {number} for the answer 'four'; a reward has to be a finite number"
    ):
        open_judge({f"{file}:score": 1.0}).numbers(Answer("q", "four", origin="x:9"))


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        ({"gsm": 1.0}, "unknown reward 'gsm'. Did you mean 'gsm8k'?"),
        ({"length": 1.0}, "the key 'most' is missing"),
        ({"format": {"pattern": "("}}, "is no regular expression"),
        ({"gsm8k": {"feild": "x"}}, "Did you mean 'field'?"),
        ({"gsm8k": math.nan}, "finite"),
    ],
)
def test_wrong_judges_are_refused(rewards, sentence):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        open_judge(rewards)


def test_several_rewards_add_up():
    judge = open_judge({"match": 0.5, "length": {"most": 4, "weight": -1.0}})
    numbers = judge.numbers(Answer("q", "yes", facts={"answer": "yes"}))
    assert numbers == {"match": 1.0, "length": 1.0}
    assert judge.total(numbers) == -0.5
    assert set(REWARDS) >= set(numbers)
