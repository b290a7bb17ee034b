"""`weft pull`: fetch a model into the cache."""

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from weft.cli.console import emit_json, progress, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weft.weights.model_cache import Progress, Pulled


def pull(
    name: str = typer.Argument(
        ..., help="Short name (smollm2-135m), repo id (org/name, org/name:Q8_0), or a folder or .gguf file with --name."
    ),
    revision: str | None = typer.Option(None, "--revision", help="Branch, tag or commit of the repo."),
    save_as: str | None = typer.Option(None, "--name", help="Keep it under this name."),
    offline: bool = typer.Option(False, "--offline", help="Never use the network."),
    verify: bool = typer.Option(False, "--verify", help="Hash the files of a model that is here already; fetch damaged ones again."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object as the last line."),
) -> None:
    """Fetch a model into the cache, verified; a pull that was cut goes on where it stopped."""
    from weft.weights import hub

    with transfer_bar() as (show, note):
        model = hub.pull(name, revision=revision, offline=offline, progress=show, save_as=save_as, verify=verify, note=note)
    count = f"{len(model.files)} file{'s' if len(model.files) > 1 else ''}"
    say(f"{model.name} is here: {size(model.bytes)}, {count}, in {model.path}")
    if sys.stderr.isatty():
        say(f"Next: weft chat {model.name}")
    if json_output:
        emit_json(describe(model))


@contextmanager
def transfer_bar() -> "Iterator[tuple[Progress, Callable[[str], None]]]":
    """A progress bar on stderr that appears with the first byte: the function that moves it, and one that says a line above it."""
    bar = progress()
    bar.disable = not bar.console.is_terminal
    task = bar.add_task("", total=None)

    def show(what: str, done: int, total: int) -> None:
        bar.start()
        bar.update(task, description=what, completed=done, total=total)

    try:
        yield show, lambda text: bar.console.print(text, soft_wrap=True, markup=False)
    finally:
        bar.stop()


def describe(model: "Pulled") -> dict[str, object]:
    """A pulled model as the verbs print it in JSON."""
    fields = ("name", "source", "revision", "commit", "date", "bytes")
    return {field: getattr(model, field) for field in fields} | {"path": str(model.path), "files": [file.path for file in model.files]}


def size(num_bytes: int) -> str:
    """Bytes for people, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
