"""`weft rm`: remove a model from the cache."""

import sys

import typer

from weft.cli.console import emit_json, say
from weft.cli.pull import size
from weft.errors import UserError


def _pulled_names(incomplete: str) -> list[str]:
    from weft.weights import hub

    return [model.name for model in hub.list_models() if model.name.startswith(incomplete)]


def rm(
    name: str = typer.Argument(..., help="Name of a pulled model, as `weft list` shows it.", autocompletion=_pulled_names),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object as the last line."),
) -> None:
    """Remove a pulled model from the cache."""
    from weft.weights import hub

    if not yes and name in {model.name for model in hub.list_models()}:
        if not sys.stdin.isatty():
            raise UserError(f"removing '{name}' needs a yes: run `weft rm {name} --yes`.")
        if not typer.confirm(f"Remove {name} from the cache?", err=True):
            raise typer.Exit(1)
    freed = hub.remove(name)
    say(f"Removed {name}: {size(freed)} freed.")
    if json_output:
        emit_json({"name": name, "bytes_freed": freed})
