"""`weft export`: a model in another format, proved before it is kept."""

from pathlib import Path
from typing import Literal, cast

import typer

from weft.cli.console import emit_json, progress, say


def export(
    model: str = typer.Argument(..., metavar="MODEL", help="A pulled model, a model folder, or a .gguf file."),
    to: str = typer.Option(..., "--to", help="hf (a Hugging Face folder) or gguf (one file, Llama family)."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Folder or .gguf file to write [default: named after the model]."),
    dtype: str | None = typer.Option(None, "--dtype", help="f32, f16, bf16, or q8_0 for gguf [default: as stored]."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object as the last line."),
) -> None:
    """Write a model as a Hugging Face folder or a GGUF file. The copy is loaded again and compared before it is kept."""
    from weft.cli.models import short_bytes, short_count
    from weft.errors import unknown
    from weft.weights.hub import find_model

    if to not in ("hf", "gguf"):
        raise unknown("format", to, ("hf", "gguf"))
    source = find_model(model)
    stem = source.stem if source.is_file() else source.resolve().name
    out = output or Path(f"{stem}-hf" if to == "hf" else f"{stem}-{dtype}.gguf" if dtype else f"{stem}.gguf")
    say(f"Reading {source} …")
    from weft.weights import export as exporter

    bar = progress()
    bar.disable = not bar.console.is_terminal
    task = bar.add_task(f"writing {out.name}", total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        done = exporter.export(source, cast(Literal["hf", "gguf"], to), out, dtype, show)
    finally:
        bar.stop()
    say(f"{done.path}: {short_count(done.parameters)} parameters as {done.dtype}, {short_bytes(done.bytes)}.")
    ids = "token ids equal" if done.tokenizer else "no tokenizer beside the weights"
    say(f"Checked against the original: KL {done.kl:.2g} nats a token, logits within {done.max_logit_difference:.2g}, {ids}.")
    if done.llama_cpp is not None:
        say(f"llama.cpp reads it too: KL {done.llama_cpp:.2g} nats a token.")
    if done.fallbacks:
        say(f"{done.fallbacks} matrices are F16: their rows are not a multiple of Q8_0's 32 numbers.")
    if json_output:
        emit_json(done.as_dict())
