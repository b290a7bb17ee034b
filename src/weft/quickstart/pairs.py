"""Fine-tuning pairs: a function's signature and docstring in, its body out.

The source is cut by line, never rewritten, so that comments and layout of the body are what people wrote. Methods are moved to the
left margin; a pair whose two halves no longer parse together (a string over several lines that the move would change) is left out.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from weft.quickstart.corpus import SourceFile
from weft.rewards.python_source import parse_python

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """One function cut in two.

    origin  "path:line" of its `def`.
    prompt  signature and docstring, without the last line's end: a tokenizer joins a line's end to the indentation after it, so a prompt
            that ended in one would say to a model that no indentation follows.
    body    the statements after the docstring, from that line end on.
    """

    origin: str
    prompt: str
    body: str


def make_pairs(files: Iterable[SourceFile], max_prompt: int, max_body: int) -> list[Pair]:
    """Every documented function of Python files whose halves have at most `max_prompt` and `max_body` characters, in file order.

    Files that do not parse give none. Two functions with the same prompt and body count once.
    """
    pairs: dict[tuple[str, str], Pair] = {}
    for file in files:
        if not file.path.endswith((".py", ".pyi")):
            continue
        tree = parse_python(file.text)
        if tree is None:
            continue
        lines = file.text.split("\n")
        for node in ast.walk(tree):
            pair = _cut(node, lines, file.path) if isinstance(node, Function) else None
            if pair is not None and len(pair.prompt) <= max_prompt and len(pair.body) <= max_body:
                pairs.setdefault((pair.prompt, pair.body), pair)
    return list(pairs.values())


def _cut(node: Function, lines: list[str], path: str) -> Pair | None:
    """The pair of one function, or None where it has no docstring, nothing after it, or no clean cut between lines."""
    if len(node.body) < 2 or ast.get_docstring(node, clean=False) is None:
        return None
    docstring, rest = node.body[0], node.body[1]
    assert docstring.end_lineno is not None
    assert node.end_lineno is not None
    if not node.lineno < docstring.lineno <= docstring.end_lineno < rest.lineno:
        return None
    margin = " " * node.col_offset
    source = lines[node.lineno - 1 : node.end_lineno]
    if not source[0].startswith(margin + ("async " if isinstance(node, ast.AsyncFunctionDef) else "def ")):
        return None
    moved = [line.removeprefix(margin) for line in source]
    cut = docstring.end_lineno - node.lineno + 1
    prompt, body = "\n".join(moved[:cut]), "\n" + "\n".join(moved[cut:]).strip("\n") + "\n"
    tree = parse_python(prompt + body)
    if tree is None or len(tree.body) != 1 or _shape(tree.body[0]) != _shape(node):
        return None
    return Pair(f"{path}:{node.lineno}", prompt, body)


def _shape(node: ast.AST) -> str:
    """What a function says apart from its docstring, whose margin the move may change."""
    assert isinstance(node, Function)
    return ast.dump(node.args) + "".join(ast.dump(statement) for statement in node.body[1:])
