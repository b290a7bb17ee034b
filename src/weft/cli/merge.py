"""`weft merge`: several models into one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from weft.cli.console import emit_json, say

if TYPE_CHECKING:
    from weft.merge.models import Merged

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make one model of several, or of a model and its adapter.")

_OUTPUT = typer.Option(..., "--output", "-o", help="Folder to write.")
_DTYPE = typer.Option(None, "--dtype", help="f32, f16 or bf16 [default: as the first model is stored].")
_JSON = typer.Option(False, "--json", help="Print one JSON object as the last line.")


@app.command()
def adapter(
    adapter: Path = typer.Argument(
        ..., metavar="ADAPTER", help="Folder of a LoRA, DoRA or IA3 adapter, Weft's or PEFT's.", show_default=False
    ),
    base: str | None = typer.Option(None, "--base", help="The model it is for [default: the one it names]."),
    force: bool = typer.Option(False, "--force", help="Take a base in 4 bits too, and write it out in full."),
    output: Path = _OUTPUT,
    dtype: str | None = typer.Option(None, "--dtype", help="f32, f16 or bf16 [default: as the base is stored]."),
    json_output: bool = _JSON,
) -> None:
    """An adapter into the weights of its base, and what that changed."""
    from weft.merge.adapter import merge_into_base

    made = merge_into_base(adapter, output, base, _dtype(dtype), force)
    say(f"{made.path}: {made.adapter} in the weights of {made.base}, as {made.dtype}.")
    say(
        f"Over {made.tokens} tokens of prompts: KL {made.kl:.2g} nats a token from the adapter beside its base, logits within "
        f"{made.max_logit_change:.2g}; the adapter itself is {made.moved:.2g} from the base."
    )
    if json_output:
        emit_json(made.as_dict())


@app.command()
def average(
    models: list[str] = typer.Argument(..., metavar="MODEL_OR_RUN...", help="Checkpoints in the order they were made, or a run's folder."),
    last: int | None = typer.Option(None, "--last", help="Take only the last K of them."),
    decay: float | None = typer.Option(None, "--decay", help="Each weighs so many times the one after it [default: all alike]."),
    output: Path = _OUTPUT,
    dtype: str | None = _DTYPE,
    json_output: bool = _JSON,
) -> None:
    """The mean of a run's last checkpoints."""
    from weft.merge.checkpoints import average_checkpoints

    _tell(average_checkpoints(models, output, last, decay, _dtype(dtype)), json_output)


@app.command()
def linear(
    models: list[str] = typer.Argument(..., metavar="MODEL...", help="Models that were trained from the same one."),
    weights: str | None = typer.Option(None, "--weights", help="One each, such as 0.7,0.3; scaled to a sum of 1 [default: all alike]."),
    output: Path = _OUTPUT,
    dtype: str | None = _DTYPE,
    json_output: bool = _JSON,
) -> None:
    """The weighted mean of models' weights (a model soup)."""
    from weft.merge.models import Models, average

    given = _numbers(weights) or [1.0] * len(models)
    _tell(average(Models(models), given, output, "linear", _dtype(dtype)), json_output)


@app.command()
def slerp(
    models: list[str] = typer.Argument(..., metavar="MODEL MODEL", help="Two models that were trained from the same one."),
    t: float = typer.Option(0.5, "--t", help="How far to go from the first to the second, 0 to 1."),
    output: Path = _OUTPUT,
    dtype: str | None = _DTYPE,
    json_output: bool = _JSON,
) -> None:
    """Spherical interpolation, tensor by tensor."""
    from weft.merge.models import Models, interpolate

    _tell(interpolate(Models(models), t, output, _dtype(dtype)), json_output)


@app.command()
def ties(
    base: str = typer.Argument(..., metavar="BASE", help="The model that the others were trained from."),
    models: list[str] = typer.Argument(..., metavar="MODEL...", help="Models whose changes are joined."),
    density: float = typer.Option(0.2, "--density", help="Share of each one's changes to keep, the largest."),
    scale: float = typer.Option(1.0, "--scale", help="Factor of what they agree on."),
    weights: str | None = typer.Option(None, "--weights", help="One each, in vote and mean [default: all alike]."),
    output: Path = _OUTPUT,
    dtype: str | None = _DTYPE,
    json_output: bool = _JSON,
) -> None:
    """What models' largest changes agree on."""
    from weft.merge.models import Models, agree

    _tell(agree(Models([base, *models]), density, scale, _numbers(weights), output, _dtype(dtype)), json_output)


def _numbers(text: str | None) -> list[float]:
    from weft.errors import UserError

    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--weights is '{text}'; give numbers with commas between them, such as 0.7,0.3.") from None


def _dtype(name: str | None) -> Any:
    from weft.errors import unknown
    from weft.weights.export import DTYPES

    known = {key: value for key, value in DTYPES.items() if value is not None}
    if name is not None and name not in known:
        raise unknown("dtype", name, known)
    return None if name is None else known[name]


def _tell(made: "Merged", json_output: bool) -> None:
    from weft.cli.models import short_count

    say(f"{made.path}: {short_count(made.parameters)} parameters as {made.dtype}, by {made.method} of {len(made.models)} models.")
    for model, distance in zip(made.models, made.distances, strict=True):
        say(f"  {distance:8.2%} away from {model}")
    if json_output:
        emit_json(made.as_dict())
