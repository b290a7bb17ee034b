"""`weft data`: prepare text into shards, look at what is in them, and check tuning records."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from weft.cli.console import emit_json, progress, say
from weft.cli.data_check import check

if TYPE_CHECKING:
    from weft.data.holdout import Method
    from weft.data.sample import Passage
    from weft.data.shards import Manifest

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Turn text into packed shards, and look at data.")
app.command()(check)
UNITS = ("bytes", "kB", "MB", "GB", "TB")


@app.command()
def prepare(
    inputs: list[str] = typer.Argument(..., metavar="FILE_OR_FOLDER...", help="Text, JSONL or Parquet files, or folders of them."),
    tokenizer: str = typer.Option(..., "--tokenizer", "-t", help="A model, or a tokenizer's file or folder."),
    output: Path = typer.Option(..., "--output", "-o", help="The folder to write."),
    field: str | None = typer.Option(None, "--field", help="Text field of JSONL and Parquet [default: text, or prompt and completion]."),
    separator: str | None = typer.Option(None, "--separator", help="A line that divides text files into documents."),
    pattern: list[str] = typer.Option([], "--pattern", help="File names to take from folders, such as '*.py'; may be repeated."),
    valid: float | None = typer.Option(None, "--valid", help="Share of the documents to hold out [default: 0.01]."),
    holdout: str = typer.Option("auto", "--holdout", help="How they are chosen: hash, tail (the last ones) or auto."),
    force: bool = typer.Option(False, "--force", help="Replace data that was prepared from something else."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Tokenise text into memory-mapped shards with a held-out part."""
    from weft.data.prepare import Settings
    from weft.data.prepare import prepare as run
    from weft.data.sources import Reading, check_used, find_files
    from weft.tokenizer import load_tokenizer

    settings = Settings(Reading(field, separator, tuple(pattern)), valid, cast("Method", holdout))
    check_used(find_files(inputs, pattern), settings.reading)
    with progress() as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        made = run(inputs, load_tokenizer(tokenizer), output, settings, tokenizer_source=tokenizer, force=force, progress=report)
    for path in made.ignored[:5]:
        say(f"left out, as the folder is divided into train and valid: {path}")
    if made.empty:
        say(f"left out for want of text: {made.empty} documents")
    summary = _summary(made.manifest)
    if json:
        emit_json({"folder": str(made.folder), "reused": made.reused, "empty": made.empty, **summary})
        return
    told = [f"{name} {part['tokens']:,} tokens in {part['documents']:,} documents" for name, part in summary["splits"].items()]
    print(f"{output}: {'; '.join(told)} ({'as it was' if made.reused else _size(summary['text_bytes']) + ' of text'})")


@app.command()
def show(
    folder: Path = typer.Argument(..., metavar="DIR", help="A folder made by `weft data prepare`."),
    length: int = typer.Option(128, "--length", help="Tokens of the sample row."),
    split: str = typer.Option("train", "--split", help="Where the sample is from: train or valid."),
    verify: bool = typer.Option(False, "--verify", help="Compare every file with its SHA-256 first."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Print the data table and the first packed row with its document boundaries."""
    from weft.data import shards
    from weft.data.sample import first_row

    manifest = shards.read_manifest(folder)
    if verify:
        say(f"{shards.verify(folder)} files are as they were written")
    store = shards.open_shards(folder, cast("shards.Split", split))
    tokenizer = None
    if (folder / shards.TOKENIZER).is_dir():
        from weft.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(str(folder / shards.TOKENIZER))
    sample = first_row(store, length, tokenizer)
    summary = _summary(manifest)
    if json:
        emit_json({"folder": str(folder), **summary, "sample": [[asdict(passage) for passage in passages] for passages in sample]})
        return
    _print_table(summary)
    print(f"\nfirst row of {split}, {length} tokens, {len(sample)} documents; what is not trained on is in ⟦brackets⟧:")
    for number, passages in enumerate(sample):
        print(_document(number, passages))


def _summary(manifest: "Manifest") -> dict[str, Any]:
    """The manifest's figures, JSON-ready."""
    splits = {}
    for name in manifest.splits:
        trained, text_bytes = manifest.total(name, "trained_tokens"), manifest.total(name, "text_bytes")
        splits[name] = {
            "tokens": manifest.total(name, "tokens"),
            "trained_tokens": trained,
            "documents": manifest.total(name, "documents"),
            "text_bytes": text_bytes,
            "bytes_per_token": text_bytes / max(1, trained),
        }
    return {
        "tokenizer": manifest.tokenizer.source,
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "vocab_size": manifest.tokenizer.vocab_size,
        "dtype": manifest.dtype,
        "text_bytes": sum(part["text_bytes"] for part in splits.values()),
        "exact_bytes": manifest.exact_bytes,
        "splits": splits,
        "sources": [source.model_dump() for source in manifest.sources],
    }


def _print_table(summary: dict[str, Any]) -> None:
    print(f"tokenizer {summary['tokenizer']}, {summary['vocab_size']:,} entries, {summary['dtype']}, {summary['tokenizer_sha256'][:12]}")
    print(f"{'split':<8}{'tokens':>16}{'trained on':>16}{'documents':>12}{'text':>12}{'bytes/token':>13}")
    for name, part in summary["splits"].items():
        counts = f"{part['tokens']:>16,}{part['trained_tokens']:>16,}{part['documents']:>12,}"
        print(f"{name:<8}{counts}{_size(part['text_bytes']):>12}{part['bytes_per_token']:>13.2f}")
    if not summary["exact_bytes"]:
        print("the tokenizer changes text, so bytes are counted by document and spread evenly over its tokens")
    sources = summary["sources"]
    for source in sources[:10]:
        print(f"from {source['path']} ({_size(source['bytes'])}, {source['split']})")
    if len(sources) > 10:
        print(f"and {len(sources) - 10} more files, {_size(sum(source['bytes'] for source in sources[10:]))}")


def _document(number: int, passages: "list[Passage]") -> str:
    """One document of the sample: its columns and its text, or its ids where there is no tokenizer."""
    shown = ""
    for passage in passages:
        text = " ".join(map(str, passage.ids)) if passage.text is None else passage.text
        shown += text if passage.trained else f"⟦{text}⟧"
    return f"── document {number}, columns {passages[0].first} to {passages[-1].last} ──\n{shown}"


def _size(count: float) -> str:
    """Bytes for people: `1.1 MB`."""
    power = 0
    while count >= 1000 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.1f} {UNITS[power]}" if power else f"{count:.0f} bytes"
