"""Pairs are real functions cut in two, and parse when put together."""

import ast
import textwrap

from weft.quickstart.corpus import SourceFile
from weft.quickstart.pairs import make_pairs

SOURCE = '''
class Point:
    @property
    def length(self) -> float:
        """Distance from the origin.

        In the units of the coordinates."""
        # Pythagoras
        return (self.x ** 2
                + self.y ** 2) ** 0.5

    def bare(self):
        return 1

    def only_documented(self):
        """Nothing after this."""


async def fetch(
    url,
    tries=3,
):
    'Fetch it.'
    for _ in range(tries):

        await get(url)


def one_line(x): "doc"; return x


def outer(x):
    """Outer."""
    def inner(y):
        """Inner."""
        return y
    text = """
left margin
"""
    return inner(x) + text
'''


def pairs(source: str, prompt: int = 1000, body: int = 1000):
    return make_pairs([SourceFile("m.py", source, len(source))], prompt, body)


def test_functions_are_cut_after_the_docstring():
    found = {pair.prompt.split("(")[0].split()[-1]: pair for pair in pairs(SOURCE)}
    assert set(found) == {"length", "fetch", "outer", "inner"}
    length = found["length"]
    assert length.prompt == ('def length(self) -> float:\n    """Distance from the origin.\n\n    In the units of the coordinates."""')
    assert length.body == "\n    # Pythagoras\n    return (self.x ** 2\n            + self.y ** 2) ** 0.5\n"
    assert length.origin == "m.py:4"
    assert found["fetch"].prompt.endswith("):\n    'Fetch it.'")
    assert found["fetch"].body == "\n    for _ in range(tries):\n\n        await get(url)\n"


def test_both_halves_together_parse_to_the_function_that_was_written():
    for pair in pairs(SOURCE):
        tree = ast.parse(pair.prompt + pair.body)
        assert len(tree.body) == 1
        assert len(tree.body[0].body) > 1


def test_a_method_that_moving_would_change_is_left_out():
    method = 'def m(self):\n    """Doc."""\n    return """\n        indented text\n"""\n'
    assert len(pairs(method)) == 1
    assert pairs("class C:\n" + textwrap.indent(method, "    ")) == []


def test_limits_copies_and_bad_files():
    assert {pair.prompt.split("(")[0] for pair in pairs(SOURCE, body=61)} == {"async def fetch", "def inner"}
    assert len(pairs(SOURCE + SOURCE)) == len(pairs(SOURCE))
    assert pairs("def broken(:\n") == []
    assert make_pairs([SourceFile("notes.txt", SOURCE, len(SOURCE))], 1000, 1000) == []
