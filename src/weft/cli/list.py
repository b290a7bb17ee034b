"""`weft list`: the models in the cache."""

import typer

from weft.cli.console import emit_json, say
from weft.cli.pull import describe, size, transfer_bar


def list_(
    verify: bool = typer.Option(False, "--verify", help="Hash every file and say which are damaged."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON array as the last line."),
) -> None:
    """List the models in the cache: name, size, source, date."""
    from rich.console import Console
    from rich.table import Table

    from weft.files import cache_home
    from weft.weights import hub, model_cache

    models, damage = hub.list_models(), {}
    with transfer_bar() as (show, _):
        for model in models:
            damage[model.name] = model_cache.damaged_files(model, hashes=verify, progress=show)
    if json_output:
        emit_json([describe(model) | {"damaged": damage[model.name]} for model in models])
        return
    if not models:
        say(f"No model has been pulled into {cache_home()} yet. Try: weft pull smollm2-135m")
        return
    table = Table("name", "size", "source", "date", "state")
    for model in models:
        bad = damage[model.name]
        state = f"damaged: {', '.join(bad)}" if bad else "verified" if verify else "ok"
        table.add_row(model.name, size(model.bytes), model.source, model.date[:10], state)
    Console(highlight=False).print(table)
    for name, bad in damage.items():
        if bad:
            say(f"Repair it with: weft pull {name} --verify")
