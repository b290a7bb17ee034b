"""`weft data check`: look at tuning records before training on them."""

import sys
from typing import TYPE_CHECKING

import typer

from weft.cli.console import emit_json
from weft.errors import UserError

if TYPE_CHECKING:
    from weft.data.check_records import Findings, Sample

SAMPLE_CHARACTERS = 1200
BAR = 40


def check(
    files: list[str] = typer.Argument(..., metavar="FILE...", help="Records: JSONL, JSON, CSV, TSV or Parquet, or owner/name on the hub."),
    model: str | None = typer.Option(None, "--model", "-m", help="The model (or tokenizer) to train: its chat template and its tokens."),
    objective: str | None = typer.Option(None, "--objective", help="What for: sft, dpo, reward, classify, distill, ppo, grpo, rejection."),
    chat_template: str | None = typer.Option(None, "--chat-template", help="Instead of the model's: chatml, plain, or a file of Jinja."),
    length: int | None = typer.Option(
        None, "--length", min=2, help="Tokens of a row (batch.length), to see what is cut [default: nothing is]."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show format, lengths, what is trained on, three samples and every error of tuning records; exits with 2 where there are errors."""
    from weft.data.check_records import check_records

    tokenizer = None
    if model is not None:
        from weft.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model)
        if chat_template is not None:
            from weft.tokenizer.templates import with_chat_template

            tokenizer = with_chat_template(tokenizer, chat_template)
    elif chat_template is not None or length is not None:
        unused = "--length" if chat_template is None else "--chat-template"
        raise UserError(f"{unused} is given without --model, so no record would be encoded; name the model, or leave {unused} out.")
    found = check_records(files, tokenizer, objective, length)
    if json:
        emit_json(found.to_json())
    else:
        _print(found, length)
    if found.num_errors:
        raise typer.Exit(2)


def _print(found: "Findings", length: int | None) -> None:
    for path, known, count in found.files:
        print(f"{path}: {f'format {known}' if known else 'no known format'}, {count:,} records")
    if found.kinds:
        print("; ".join(f"{count:,} {name}" for name, count in found.kinds.items()))
    if found.duplicates:
        print(f"records that say the same as an earlier one: {found.duplicates:,}")
    if found.labels:
        print("labels: " + ", ".join(f"{label} {count:,}" for label, count in found.labels.most_common(20)))
    if found.lengths:
        _print_lengths(found, length)
    if found.samples:
        marked = "in green" if sys.stdout.isatty() else "in {+brackets+}"
        print(f"\nsamples; what is trained on is {marked}:")
        for sample in found.samples:
            print(_shown(sample))
    if found.num_errors:
        more = f", the first {len(found.errors)}" if found.num_errors > len(found.errors) else ""
        print(f"\nerrors: {found.num_errors:,}{more}")
        for error in found.errors:
            print(f"  {error}")
    elif found.lengths:
        print("\nno errors")


def _print_lengths(found: "Findings", length: int | None) -> None:
    tokens = sum(found.lengths)
    share = f"{found.trained_tokens:,} trained on ({found.trained_tokens / tokens:.1%})"
    print(f"{len(found.lengths):,} texts of {tokens:,} tokens, {share}")
    print("tokens of a text: " + ", ".join(f"{name} {value:,}" for name, value in found.quantiles().items()))
    histogram = found.histogram()
    most = max(count for _, count in histogram)
    for bound, count in histogram:
        print(f"  to {bound:>6,} {count:>8,} {'█' * round(BAR * count / most)}")
    if length is not None:
        print(
            f"texts cut by rows of {length:,}: {found.truncated:,}{f', by {found.cut_tokens:,} tokens in all' if found.truncated else ''}"
        )


def _shown(sample: "Sample") -> str:
    """A sample as text; control characters, which could change the terminal, are left out."""
    terminal = sys.stdout.isatty()
    opening, closing = ("\x1b[32m", "\x1b[0m") if terminal else ("{+", "+}")
    name = f"{sample.origin}{f', {sample.part}' if sample.part else ''}"
    shown, left = "", SAMPLE_CHARACTERS
    for run in sample.runs:
        text = "".join(character for character in run.text if character in "\n\t" or character.isprintable())
        text = text if len(text) <= left else f"{text[:left]}… ({len(text) - left:,} characters more)"
        shown += f"{opening}{text}{closing}" if run.trained else text
        left = max(100, left - len(text))
    return f"── {name} ──\n{shown.rstrip()}"
