"""`weft generate`: continue a text."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli.console import emit_json, say
from weft.cli.options import EngineOptions, GrammarOptions, SamplingOptions, with_groups
from weft.cli.pace import Pace
from weft.errors import UserError

if TYPE_CHECKING:
    from weft.engine import Engine, Request, Result

ROWS = 16


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What is reported, and how."""

    logprobs: Annotated[bool, typer.Option("--logprobs", help="Report each token's log-probability.")] = False
    top_logprobs: Annotated[int, typer.Option("--top-logprobs", help="And those of this many of the likeliest tokens.")] = 0
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the text when it is finished.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False


@with_groups
def generate(
    model: str = typer.Argument("smollm2-135m", help="A pulled model's name, a model folder or a GGUF file."),
    prompts: list[str] = typer.Option([], "--prompt", "-p", help="Text to continue, as it is; - reads stdin; may be repeated."),
    max_tokens: int = typer.Option(256, "--max-tokens", help="Most tokens to generate."),
    sampling: SamplingOptions = SamplingOptions(),
    form: GrammarOptions = GrammarOptions(),
    n: int = typer.Option(1, "--n", help="Continuations a prompt."),
    beams: int = typer.Option(1, "--beams", help="Beam search of this width; with --n the best of it."),
    length_penalty: float = typer.Option(1.0, "--length-penalty", help="Beams compare by log-probability / length ** this."),
    output: OutputOptions = OutputOptions(),
    run: EngineOptions = EngineOptions(),
) -> None:
    """Continue a text. Greedy, unless an option asks for samples; no chat template is applied."""
    from weft.engine import Request
    from weft.engine.open import open_engine

    sampled = sampling.samples or (n > 1 and beams == 1)
    params = sampling.params(
        temperature=1.0 if sampled else 0.0,
        max_tokens=max_tokens,
        n=n,
        beams=beams,
        length_penalty=length_penalty,
        logprobs=output.logprobs,
        top_logprobs=output.top_logprobs,
        grammar=form.grammar(),
    )
    texts = _read_prompts(prompts)
    rows, adapter = max(beams, min(ROWS, n * len(texts))), run.one_adapter
    engine = open_engine(model, run.device, run.dtype, rows, draft=run.draft, fast=run.fast, int8_state=run.int8_state, adapter=adapter)
    requests = [Request(text, params) for text in texts]
    alone = len(texts) == 1 and n == 1
    stream = alone and beams == 1 and not (output.json or output.no_stream)
    results, pace = _run(engine, requests, stream)
    if output.json:
        described = [_describe(result) for result in results]
        emit_json({"model": model, **described[0], "tokens_per_s": pace.tokens_per_s, **({} if alone else {"results": described})})
    elif not stream:
        for result in results:
            print(result.text if alone else f"==> {_title(result, len(texts), n)} <==\n{result.text}\n")
    if output.logprobs or output.top_logprobs:
        _say_logprobs(engine, results)
    say(pace.line())
    if engine.stats.drafted_tokens:
        say(f"{engine.stats.accepted_tokens} of {engine.stats.drafted_tokens} drafted tokens stood")


def _run(engine: "Engine", requests: "Sequence[Request]", stream: bool) -> "tuple[list[Result], Pace]":
    """Run requests to their end; `stream` shows the text of a single one as it comes."""
    pace, results, begun = Pace(), [], set()
    for event in engine.stream(requests):
        if event.token is not None:
            pace.count((event.request, event.index) not in begun)
            begun.add((event.request, event.index))
        if stream:
            print(event.text, end="", flush=True)
        if event.result is not None:
            results.append(event.result)
            pace.count_whole(0 if event.token is not None else len(event.result.ids))
    if stream:
        print()
    results.sort(key=lambda result: (result.request, result.index))
    pace.prompt_tokens = sum(result.prompt_tokens for result in results if result.index == 0)
    return results, pace


def _read_prompts(given: Sequence[str]) -> list[str]:
    if not given and sys.stdin.isatty():
        raise UserError("there is no prompt; give one with -p 'Once upon a time', or - to read it from stdin.")
    if list(given).count("-") > 1:
        raise UserError("-p - is given twice, but stdin can be read once; give the other prompts as text.")
    return [_read_stdin() if text == "-" else text for text in given or ["-"]]


def _read_stdin() -> str:
    """All of stdin, without the line end that `echo` and editors put at the end."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 (byte {error.start}); convert the prompt to UTF-8.") from None


def _title(result: "Result", num_prompts: int, n: int) -> str:
    parts = [f"prompt {result.request + 1}"] * (num_prompts > 1) + [f"text {result.index + 1}"] * (n > 1)
    score = "" if result.score is None else f", score {result.score:.4f}"
    return ", ".join(parts) + score


def _describe(result: "Result") -> dict[str, Any]:
    """A result as JSON: `prompt` and `index` count from 0; `logprobs`, `seed` and `score` where there are any."""
    fields = dataclasses.asdict(result)
    fields["prompt"] = fields.pop("request")
    for token in fields["logprobs"] or ():
        if not token["top"]:
            del token["top"]
    return {name: value for name, value in fields.items() if value is not None}


def _say_logprobs(engine: "Engine", results: "Sequence[Result]") -> None:
    assert engine.tokenizer is not None
    for result in results:
        for token in result.logprobs or ():
            others = " ".join(f"{engine.tokenizer.token(index)!r}:{value:.3f}" for index, value in token.top)
            say(f"{token.logprob:9.4f}  {engine.tokenizer.token(token.id)!r}  {others}".rstrip())
