"""Python source as a tree, quietly. Nothing is ever executed."""

import ast
import warnings


def parse_python(source: str) -> ast.Module | None:
    """The syntax tree of a source, or None where it does not parse; warnings about its style are not the reader's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
