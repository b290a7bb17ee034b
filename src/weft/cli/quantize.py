"""`weft quantize`: a model in 8 or 4 bits, and what that cost it."""

from pathlib import Path
from typing import Any, cast

import typer

from weft.cli.console import emit_json, progress, say


def quantize(
    model: str = typer.Argument(..., metavar="MODEL", help="A pulled model, a model folder, or a .gguf file."),
    to: str = typer.Option(..., "--to", help="int8, int4 or nf4."),
    double: bool = typer.Option(False, "--double", help="nf4 as QLoRA stores it: groups of 64, their scales in 8 bits."),
    method: str = typer.Option("rtn", "--method", help="rtn (round to nearest) or gptq (calibrated on --text)."),
    text: Path | None = typer.Option(None, "--text", help="UTF-8 text to calibrate and measure on [default: Python's documentation]."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Folder to write [default: named after the model]."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object as the last line."),
) -> None:
    """Store a model's weights in fewer bits and measure how far its predictions move."""
    from weft.cli.models import short_bytes
    from weft.errors import UserError, unknown
    from weft.weights.hub import find_model

    if to not in ("int8", "int4", "nf4"):
        raise unknown("format", to, ("int8", "int4", "nf4"))
    if method not in ("rtn", "gptq"):
        raise unknown("method", method, ("rtn", "gptq"))
    if double and to != "nf4":
        raise UserError(f"--double is given with --to {to}; only nf4 has scales in 8 bits: leave it out, or give --to nf4.")
    source = find_model(model)
    stem = source.stem if source.is_file() else source.resolve().name
    out = output or Path(f"{stem}-{to}")
    say(f"Reading {source} …")
    from weft.quant.verb import quantize_folder
    from weft.spec import Quant

    bar = progress()
    bar.disable = not bar.console.is_terminal
    task = bar.add_task(f"rounding to {to}", total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        done = quantize_folder(source, Quant(type=cast(Any, to), minimum=to == "int4", double=double), out, cast(Any, method), text, show)
    finally:
        bar.stop()
    say(f"{done.path}: {short_bytes(done.bytes)} of weights, {done.bits:.2f} bits each in {done.matrices} matrices.")
    if done.kept:
        say(f"{done.kept} matrices stay as they were: routers, and those whose rows are not a multiple of 32 numbers.")
    say(f"{done.drift.line()}.")
    if json_output:
        emit_json(done.as_dict())
