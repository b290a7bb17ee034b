"""`weft verify`: what Weft claims, proved on a model and a machine."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from weft.cli.console import emit_json, say
from weft.cli.options import RunOptions, with_groups

if TYPE_CHECKING:
    from weft.verify import Check

_NAME_WIDTH = 26


@with_groups
def verify(
    model: str = typer.Argument("smollm2-135m", help="A pulled model's name, a model folder or a GGUF file."),
    prompts: Path | None = typer.Option(None, "--prompts", help="A file with a prompt a line, instead of the built-in ones."),
    quick: bool = typer.Option(False, "--quick", help="Shorter prompts and texts."),
    run: RunOptions = RunOptions(),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object as the last line."),
) -> None:
    """Prove on a model what Weft claims: each check with its figure and limit. Exits with 1 where one fails."""
    from weft.verify import verify as prove

    out = sys.stderr if json_output else sys.stdout

    def show(check: "Check") -> None:
        print(line(check), file=out, flush=True)

    report = prove(model, run.device, run.dtype, prompts, quick, show)
    statuses = [check.outcome.status for check in report.checks]
    say(f"{model} in {report.dtype} on {report.device}: " + ", ".join(f"{statuses.count(s)} {s}" for s in ("pass", "fail", "skipped")))
    if json_output:
        emit_json(report.as_dict())
    if not report.passed:
        raise typer.Exit(1)


def line(check: "Check") -> str:
    """A check as a row of the table, and what was compared on a row below it."""
    outcome = check.outcome
    row = f"{outcome.status:<8}{check.name:<{_NAME_WIDTH}}"
    if outcome.figure is not None and outcome.limit is not None:
        row += f"{_number(outcome.figure)} {outcome.unit} (limit {_number(outcome.limit)})"
    return f"{row.rstrip()}\n{'':<8}{outcome.detail}"


def _number(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:.2g}"
