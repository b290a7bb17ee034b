"""Options that several verbs share, each group a dataclass that a command takes as one parameter."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from weft.errors import UserError, unknown
from weft.files import read_text

if TYPE_CHECKING:
    from weft.engine import Grammar, SamplingParams


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; None where the user said nothing."""

    temp: Annotated[float | None, typer.Option("--temp", help="Sampling temperature; 0 always takes the likeliest token.")] = None
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample among the K likeliest tokens.")] = None
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample among the likeliest tokens that reach this probability.")] = None
    min_p: Annotated[float | None, typer.Option("--min-p", help="Leave out tokens below this share of the likeliest one's.")] = None
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1: repeat less, prompt included.")] = None
    presence_penalty: Annotated[float | None, typer.Option("--presence-penalty", help="Taken from logits of tokens already there.")] = None
    frequency_penalty: Annotated[float | None, typer.Option("--frequency-penalty", help="Taken as often as a token is there.")] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Makes samples reproducible.")] = None
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None

    @property
    def samples(self) -> bool:
        """Whether an option that only means something in sampling is given."""
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))

    def given(self) -> dict[str, Any]:
        """What the user said, by SamplingParams' names."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["temperature"] = values.pop("temp")
        values["stop"] = tuple(self.stop) if self.stop else None
        return {name: value for name, value in values.items() if value is not None}

    def params(self, **others: Any) -> "SamplingParams":
        """SamplingParams from what the user said and from `others`, which give way to it."""
        from weft.engine import SamplingParams

        return SamplingParams(**(others | self.given()))


@dataclasses.dataclass(frozen=True)
class GrammarOptions:
    """What the text must match."""

    json_schema: Annotated[str | None, typer.Option("--json-schema", help="JSON valid under this schema: a file, or itself.")] = None
    regex: Annotated[str | None, typer.Option("--regex", help="Text that this regular expression matches as a whole.")] = None

    def grammar(self) -> "Grammar | None":
        from weft.engine import Grammar

        if self.json_schema is not None and self.regex is not None:
            raise UserError("--json-schema and --regex are both given; a text is held to one of them: leave the other out.")
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.json_schema is None:
            return None
        inline = self.json_schema.lstrip().startswith("{")
        return Grammar("json_schema", self.json_schema if inline else read_text(self.json_schema, "JSON schema"))


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and in which numbers a model runs."""

    device: Annotated[str, typer.Option("--device", help="cpu, cuda, mps or auto.")] = "auto"
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, float64 or auto.")] = "auto"


@dataclasses.dataclass(frozen=True)
class EngineOptions(RunOptions):
    """And how text is generated there."""

    draft: Annotated[
        str,
        typer.Option(
            "--draft", help="Guess tokens and check several at once: ngram, mtp (the model's own modules), a model of its tokenizer, none."
        ),
    ] = "none"
    fast: Annotated[bool, typer.Option("--fast", help="Read prompts faster and less exactly where weights are quantised.")] = False
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="The folder of an adapter to put on the model.")] = None
    state: Annotated[str, typer.Option("--state", help="auto, or int8: keys and values in 8 bits, in half the memory.")] = "auto"

    @property
    def one_adapter(self) -> str | None:
        """Raises UserError where several are given to a verb that generates with one."""
        if self.adapter is not None and len(self.adapter) > 1:
            raise UserError(f"--adapter is given {len(self.adapter)} times; give one. `weft serve` takes several.")
        return self.adapter[0] if self.adapter else None

    @property
    def int8_state(self) -> bool:
        """Raises UserError for a word that is no format of state."""
        if self.state not in ("auto", "int8"):
            raise unknown("format of state", self.state, ("auto", "int8"))
        return self.state == "int8"


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options: to typer they are so many single options."""
    groups: dict[str, type] = {}
    parameters = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        group: Any = parameter.annotation
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in dataclasses.fields(group)
        ]

    def run(**values: Any) -> None:
        taken = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)}) for name, group in groups.items()
        }
        command(**values, **taken)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
