"""`weft tokenizer`: train a vocabulary, turn text into ids and back, and show how it happens."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from weft.cli.console import emit_json, progress, say
from weft.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from weft.tokenizer import Tokenizer
    from weft.tokenizer.train import Kind

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train, use and explain tokenizers.")

_MODEL = typer.Argument(..., metavar="MODEL_OR_FILE", help="A pulled model, a model folder, or a tokenizer file of any format.")
_JSON = typer.Option(False, "--json", help="Print one JSON object as the last line.")


def read_argument(text: str | None) -> str:
    """A text from the command line, or all of standard input where it is `-` or missing."""
    if text is not None and text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start}); convert it to UTF-8 and try again.") from None


@app.command()
def train(
    files: list[str] = typer.Argument(..., metavar="FILES...", help="Text, JSONL or Parquet files, or folders of them."),
    kind: str = typer.Option("bpe", "--kind", help="bpe (byte-level), wordpiece or unigram."),
    vocab_size: int = typer.Option(..., "--vocab-size", help="Entries of the vocabulary, special tokens among them."),
    output: Path = typer.Option(..., "--output", "-o", help="The folder to write."),
    special: list[str] = typer.Option([], "--special", help="A special token; may be repeated [default: the kind's own]."),
    split: str = typer.Option("llama3", "--split", help="How bpe cuts text: gpt2, llama3 (digits in threes) or qwen2 (single digits)."),
    digits: int | None = typer.Option(None, "--digits", help="Digits that bpe keeps together at most, 0 for any number."),
    lowercase: bool = typer.Option(False, "--lowercase", help="wordpiece: fold case and drop accents."),
    sample_bytes: int | None = typer.Option(None, "--sample-bytes", help="Bytes to train on at most [default: 200 MB, unigram 20 MB]."),
    json_output: bool = _JSON,
) -> None:
    """Train a tokenizer on text and write it in Hugging Face's layout."""
    import time

    from weft.data.sources import Reading, find_files, read_documents
    from weft.errors import unknown
    from weft.tokenizer.train import KINDS, SAMPLE_BYTES, Read, bytes_per_token, evenly, train_tokenizer

    def read_all(paths: "Sequence[Path]") -> "Iterator[str]":
        return (document.text for path in paths for document in read_documents(path, Reading()))

    if kind not in KINDS:
        raise unknown("kind of tokenizer", kind, KINDS)
    limit = SAMPLE_BYTES[kind] if sample_bytes is None else sample_bytes
    begin = time.monotonic()
    paths = find_files(files).train
    total = sum(path.stat().st_size for path in paths)
    if total > limit:
        say(f"The files have {_size(total)}: training on an even sample of {_size(limit)} (--sample-bytes).")
    read = Read()
    with progress() as bar:
        task = bar.add_task("reading", total=max(1, total))

        def show(done: int | None) -> None:
            if done is None:
                bar.update(task, description="learning", total=None)
            else:
                bar.update(task, completed=done)

        stream = _watched(read_all(paths), show)
        tokenizer = train_tokenizer(
            cast("Kind", kind), evenly(stream, limit / max(1, total)), vocab_size, special or None, split=split, digits=digits,
            lowercase=lowercase, sample_bytes=limit, read=read,
        )  # fmt: skip
    tokenizer.save(output)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "text_bytes": read.num_bytes,
        "sampled": read.stopped or total > limit,
        "bytes_per_token": round(bytes_per_token(tokenizer, next(read_all(paths), "")[:100_000]), 3),
        "seconds": round(time.monotonic() - begin, 3),
    }
    learned = f"{kind} of {tokenizer.vocab_size} tokens from {_size(read.num_bytes)} of text in {facts['seconds']:.1f} s"
    say(f"{learned}, {facts['bytes_per_token']:.2f} bytes a token.")
    if tokenizer.vocab_size < vocab_size:
        say(f"The text has no more pieces to give: {vocab_size} were asked for.")
    if json_output:
        emit_json({"folder": str(output), "kind": kind, **facts})
    else:
        print(output)


def _watched(texts: "Iterable[str]", show: "Callable[[int | None], None]") -> "Iterator[str]":
    """Texts as they are, telling the bytes read so far, and None when all are read."""
    done = 0
    for text in texts:
        done += len(text.encode())
        show(done)
        yield text
    show(None)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB" if num_bytes >= 1e3 else f"{num_bytes} bytes"


@app.command()
def encode(
    model: str = _MODEL,
    text: str | None = typer.Argument(None, metavar="[TEXT or -]", help="The text; - or nothing reads standard input."),
    bos: bool | None = typer.Option(None, "--bos/--no-bos", help="Begin with the BOS, or add nothing [default: as the tokenizer says]."),
    special: bool = typer.Option(True, "--special/--no-special", help="Read special tokens that are spelled in the text, or not."),
    json_output: bool = _JSON,
) -> None:
    """Turn text into ids."""
    from weft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(read_argument(text), special=special, bos=bos)
    if json_output:
        emit_json({"ids": ids, "tokens": [tokenizer.token(index) for index in ids]})
    else:
        print(" ".join(map(str, ids)))


@app.command()
def decode(
    model: str = _MODEL,
    ids: list[str] = typer.Argument(None, metavar="[IDS or -]", help="Numbers; - or nothing reads standard input."),
    special: bool = typer.Option(False, "--special/--no-special", help="Show special tokens, or leave them out."),
    json_output: bool = _JSON,
) -> None:
    """Turn ids into text."""
    from weft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    given = " ".join(ids) if ids and ids != ["-"] else read_argument(None)
    words = re.sub(r"[\[\],]", " ", given).split()
    bad = next((word for word in words if not word.isdecimal()), None)
    if bad is not None:
        raise UserError(f"'{bad}' is no id; give whole numbers, with spaces or commas between.")
    numbers = [int(word) for word in words]
    beyond = next((index for index in numbers if tokenizer.token(index) is None), None)
    if beyond is not None:
        raise UserError(f"there is no token {beyond}; this vocabulary has ids from 0 to {tokenizer.vocab_size - 1}.")
    text = tokenizer.decode(numbers, skip_special=not special)
    if json_output:
        emit_json({"text": text})
    else:
        print(text)


@app.command()
def explain(
    text: str | None = typer.Argument(None, metavar="[TEXT or -]", help="The text; - or nothing reads standard input."),
    tokenizer: str | None = typer.Option(None, "--tokenizer", "-t", metavar="MODEL_OR_FILE", help="Default: the first pulled model."),
    json_output: bool = _JSON,
) -> None:
    """Show how text becomes tokens, step by step: merges in their order, the best segmentation, the longest matches."""
    from dataclasses import asdict

    from weft.tokenizer.drawing import draw
    from weft.tokenizer.explain import Explainer

    loaded = _given_or_pulled(tokenizer)
    explanation = Explainer(loaded)(read_argument(text))
    if json_output:
        emit_json({**asdict(explanation), "ids": explanation.ids})
    else:
        print("\n".join(draw(explanation, loaded.style == "byte_level")))


def _given_or_pulled(name: str | None) -> "Tokenizer":
    from weft.tokenizer import load_tokenizer

    if name is not None:
        return load_tokenizer(name)
    from weft.weights.hub import list_models

    pulled = list_models()
    if not pulled:
        raise UserError(
            "no tokenizer was given and no model has been pulled; name one with --tokenizer FILE, or run `weft pull smollm2-135m` first."
        )
    say(f"tokenizer of {pulled[0].name}")
    return load_tokenizer(pulled[0].name)
