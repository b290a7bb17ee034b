"""`weft quickstart`: the main job, from raw text to a model that writes it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from weft.cli.console import console, emit_json
from weft.errors import UserError
from weft.quickstart.options import Options

if TYPE_CHECKING:
    from rich.console import Console


def quickstart(
    minutes: float = typer.Option(3.0, "--minutes", help="Time to pretrain for, compilation apart."),
    out: Path = typer.Option(Path("quickstart"), "--out", "-o", help="Folder for the model and the report."),
    corpus: Path = typer.Option(None, "--corpus", help="Your own code or text; without it, Python's standard library.", show_default=False),
    seed: int = typer.Option(0, "--seed", help="Of weights, data order and samples."),
    device: str = typer.Option("auto", "--device", help="cpu, cuda, mps or auto."),
    dtype: str = typer.Option("auto", "--dtype", help="Of the matrix products: bfloat16, float32 or auto."),
    compiled: bool = typer.Option(True, "--compile/--no-compile", help="Train through torch.compile where it works."),
    restart: bool = typer.Option(False, "--restart", help="Throw away an earlier run's work in the folder."),
    json: bool = typer.Option(False, "--json", help="Print the report as the last line."),
) -> None:
    """From raw text to a working model: read, split, tokenise, pretrain, fine-tune, measure, save. Nothing is downloaded.

    Ctrl-C stops it; the same command carries on.
    """
    options = Options(out, corpus, minutes, seed, device, dtype)

    from weft.quickstart.pipeline import quickstart as run_quickstart
    from weft.quickstart.report import next_commands
    from weft.quickstart.settings import Settings

    screen = Screen(console())
    try:
        report = run_quickstart(options, Settings(compile=compiled), restart, screen)
    except KeyboardInterrupt:
        screen.stop()
        screen.console.print("\nInterrupted; what was done is kept. Run the same command to carry on.")
        raise typer.Exit(130) from None
    except UserError:
        screen.stop()
        raise
    screen.stop()
    print_report(screen.console, report, next_commands(report))
    if json:
        emit_json(report)


class Screen:
    """Steps on a terminal: a bar for the one that runs, a line for each that is done. Elsewhere lines alone."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.table import Column

        self.console = console
        note = TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        title = TextColumn("{task.description}", table_column=Column(no_wrap=True))
        columns = (SpinnerColumn(), title, BarColumn(bar_width=12), TimeElapsedColumn(), TimeRemainingColumn(), note)
        self._bar = Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal)
        self._task: Any = None
        self._title = ""
        self._started = 0.0

    def begin(self, number: int, count: int, title: str) -> None:
        self._title, self._started = f"{number}/{count} {title}", time.perf_counter()
        self._bar.start()
        self._task = self._bar.add_task(self._title, total=None, note="")
        if not self.console.is_terminal:
            self.console.print(f"{self._title} …", soft_wrap=True)

    def advance(self, done: float, total: float | None, note: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, note=note)

    def end(self, line: str, known: bool) -> None:
        self._bar.remove_task(self._task)
        took = "done before" if known else f"{time.perf_counter() - self._started:.0f} s"
        self.console.print(f"[green]✓[/green] [bold]{self._title}[/bold] [dim]({took})[/dim]\n  {_plain(line)}", soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(f"  [yellow]{_plain(text)}[/yellow]", soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def print_report(console: "Console", report: dict[str, Any], commands: list[str]) -> None:
    """The closing page: the table of bits, three samples, where everything is, what to do next."""
    from rich.table import Table

    from weft.quickstart.report import bits_table, stages_table

    table = Table(title="Bits a byte of held-out text (fewer is better)", title_justify="left", box=None, padding=(0, 2))
    table.add_column("")
    table.add_column("", justify="right")
    for label, value in bits_table(report):
        style = "bold green" if label.startswith("this model") else ""
        table.add_row(label, f"{value:.3f}", style=style)
    console.print()
    console.print(table)
    heads, rows = stages_table(report)
    if rows:
        stages = Table(title="The three stages of the model", title_justify="left", box=None, padding=(0, 2))
        stages.add_column("")
        for head in heads:
            stages.add_column(head, justify="right")
        for row in rows:
            stages.add_row(*row)
        console.print()
        console.print(stages)
    for number, sample in enumerate(report["samples"], 1):
        console.print(f"\n[bold]sample {number}[/bold]")
        console.print(sample.rstrip("\n"), markup=False, soft_wrap=True)
    out = Path(report["out"])
    picture = f", picture {out / report['picture']}" if report["picture"] else ""
    console.print(f"\n[bold]model[/bold] {_plain(str(out / 'model'))}   run card {_plain(str(out / 'quickstart.md'))}{_plain(picture)}")
    console.print("[bold]next[/bold]")
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)
