"""Whether an answer is the body of a Python function: parsed, never run."""

import ast
from dataclasses import dataclass

from weft.rewards.python_source import parse_python
from weft.rewards.reward import Answer, Reward

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class PythonFunction(Reward):
    """For prompts that are a signature with a docstring: 0 where signature and answer do not parse as one function that does something,
    else `parses`, and what is left to 1 in proportion to the parameters that the body reads (`self` and `cls` need not be).

    parses  what an answer has that parses and reads no parameter.
    like    a column with a body that people wrote: an answer with fewer than half of its lines is worth less in proportion, for short
            bodies parse more easily. None takes any length.
    A body without effect (`pass`, `...`, a string, a name or a constant returned as it is, things set to constants and nothing else, `raise
    NotImplementedError`) is worth 0, and so is one that the model did not end: it may be a piece that parses by chance.
    """

    parses: float = 0.5
    like: str | None = None

    def judge(self, answer: Answer) -> float:
        body, left = take_body(answer.text)
        if not isinstance(answer.prompt, str) or not (answer.finished or left):
            return 0.0
        found = read_function(answer.prompt, body)
        if found is None or found.idle:
            return 0.0
        least = 1.0 if self.like is None else count_lines(answer.said(self.like, "python")) / 2
        return (self.parses + (1 - self.parses) * found.share_used) * min(1.0, count_lines(body) / max(1.0, least))


@dataclass(frozen=True)
class Function:
    """What can be said of a function without running it.

    idle        its body, docstring apart, has no effect.
    parameters  that a body should read: all but `self` and `cls`.      used  how many of them it reads.
    """

    idle: bool
    parameters: int
    used: int

    @property
    def share_used(self) -> float:
        return self.used / self.parameters if self.parameters else 1.0


def take_body(text: str) -> tuple[str, bool]:
    """What of a continuation belongs to the function: everything before the first line at the left margin. And whether there is one.

    A model that goes on to the next function is so judged by the one that was asked for. What comes before the first line end carries on
    the prompt's last line.
    """
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if number and line.strip() and not line[0].isspace():
            return "".join(lines[:number]), True
    return text, False


def count_lines(body: str) -> int:
    """Lines with something on them."""
    return sum(bool(line.strip()) for line in body.splitlines())


def read_function(prompt: str, body: str) -> Function | None:
    """The one function that signature, docstring and body are; None where they do not parse as one, or where the docstring is all of it."""
    tree = parse_python(prompt + body)
    if tree is None or len(tree.body) != 1:
        return None
    node = tree.body[0]
    if not isinstance(node, _Function) or len(node.body) < 2:
        return None
    statements = node.body[1:]
    names = _parameters(node)
    read = {name.id for part in statements for name in ast.walk(part) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}
    return Function(all(map(_has_no_effect, statements)), len(names), len(names & read))


def _parameters(node: _Function) -> set[str]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = [argument.arg for argument in every if argument is not None]
    return set(names) - {"self", "cls"}


def _has_no_effect(statement: ast.stmt) -> bool:
    """Whether a statement could stand in for a body that nobody wrote: nothing is done, or a name or a constant is returned as it is, or
    something is set to a constant. Setting an attribute to a name, as setters do, is an effect."""
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Attribute()):
            return True
        case ast.Expr(value=value) | ast.Return(value=value):
            parts = value.elts if isinstance(value, ast.Tuple | ast.List) else [value]
            return all(part is None or isinstance(part, ast.Constant | ast.Name) for part in parts)
        case ast.Assign(targets=targets, value=value):
            local = all(isinstance(target, ast.Name) for target in targets)
            return _is_constant(value) or (local and isinstance(value, ast.Name))
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False


def _is_constant(value: ast.expr) -> bool:
    """A constant, a sequence of such, or an empty dictionary."""
    if isinstance(value, ast.Tuple | ast.List):
        return all(map(_is_constant, value.elts))
    return isinstance(value, ast.Constant) or (isinstance(value, ast.Dict) and not value.keys)
