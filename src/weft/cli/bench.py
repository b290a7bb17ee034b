"""`weft bench`: how fast a model reads and writes here."""

from typing import TYPE_CHECKING

import typer

from weft.cli.console import emit_json, say
from weft.cli.options import EngineOptions, with_groups

if TYPE_CHECKING:
    from weft.engine.engine import Engine


@with_groups
def bench(
    model: str = typer.Argument("smollm2-135m", help="A pulled model's name, a model folder or a GGUF file."),
    prompt: int = typer.Option(512, "--prompt", help="Tokens of every prompt."),
    new: int = typer.Option(128, "--new", help="Tokens written after it."),
    threads: int | None = typer.Option(None, "--threads", help="Processor threads [default: all]."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object as the last line."),
    run: EngineOptions = EngineOptions(),
) -> None:
    """Measure prompt and decode speed at 1, 4 and 16 rows, and compare them with what the machine can do."""
    import torch

    from weft.engine.measure import measure
    from weft.engine.open import open_engine

    if threads is not None:
        torch.set_num_threads(max(1, threads))

    def engine(rows: int) -> "Engine":
        return open_engine(model, run.device, run.dtype, rows, False, None, run.draft, run.fast, run.int8_state, run.one_adapter)

    speed = measure(engine, prompt, new, lambda what: say(f"Measuring {what} …"))
    say(f"prompt of {prompt}     {speed.prompt_tokens_per_s:9,.0f} tokens/s   {speed.flops_share:.0%} of {speed.flops / 1e9:,.0f} GFLOP/s")
    share = f"{speed.bandwidth_share:.0%} of {speed.bandwidth / 1e9:,.0f} GB/s at {speed.bytes_per_token / 1e6:,.1f} MB a token"
    say(f"decode, 1 row     {speed.decode_tokens_per_s:9,.1f} tokens/s   {share}")
    say(f"decode, 4 rows    {speed.decode_tokens_per_s_4:9,.1f} tokens/s together")
    say(f"decode, 16 rows   {speed.decode_tokens_per_s_16:9,.1f} tokens/s together")
    say(f"first token       {speed.first_token_cold_s:9.3f} s, {speed.first_token_warm_s:.3f} s where the prompt was read before")
    if json_output:
        emit_json({"model": model, "threads": torch.get_num_threads(), **speed.as_dict()})
