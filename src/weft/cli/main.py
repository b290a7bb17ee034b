"""The `weft` command: finds the verb, loads that verb's module alone, and turns errors into sentences and exit codes."""

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from weft import __version__
from weft.errors import UserError, nearest

# verb -> (function or typer app in weft.cli.<module>, one line for `weft --help`)
VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart:quickstart", "From raw text to a model that writes Python, on two cores."),
    "train": ("train:train", "Train a model from a recipe."),
    "generate": ("generate:generate", "Continue a text."),
    "chat": ("chat:chat", "Talk with a model."),
    "serve": ("serve:serve", "Answer requests over HTTP, as OpenAI's servers do."),
    "tokenizer": ("tokenizer:app", "Train, use and explain tokenizers."),
    "data": ("data:app", "Turn text into packed shards, and look at them."),
    "models": ("models:models", "List the model families Weft knows, with sizes."),
    "pull": ("pull:pull", "Fetch a model into the cache."),
    "list": ("list:list_", "List the models in the cache."),
    "rm": ("rm:rm", "Remove a model from the cache."),
    "verify": ("verify:verify", "Prove on a model what Weft claims, with figures."),
    "merge": ("merge:app", "Make one model of several, or of a model and its adapter."),
    "quantize": ("quantize:quantize", "Store a model in 8 or 4 bits, and measure what it costs."),
    "bench": ("bench:bench", "Measure how fast a model reads and writes on this machine."),
    "export": ("export:export", "Write a model as a Hugging Face folder or a GGUF file."),
}


class LazyGroup(TyperGroup):
    """A command group that imports a verb's module when the verb is used: `weft --help` and `weft models` never load torch."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        return _named(cmd_name) if self.listing else load(cmd_name)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        self.listing = True  # names and help lines suffice to complete a verb
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self.listing = False

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in VERBS.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise UserError(f"there is no verb '{args[0]}'.{nearest(args[0], VERBS)} Run `weft --help` for the list.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("weft: interrupted.", file=sys.stderr)
            raise typer.Exit(130) from None


def _named(verb: str) -> Any:
    """A command that has the verb's name and help line, and no more."""
    stub = typer.Typer(add_completion=False)
    stub.command(name=verb, help=VERBS[verb][1])(lambda: None)
    return typer.main.get_command(stub)


def load(verb: str) -> Any:
    """Import a verb's module and return its click command."""
    module_name, attribute = VERBS[verb][0].split(":")
    target = getattr(importlib.import_module(f"weft.cli.{module_name}"), attribute)
    if isinstance(target, typer.Typer):
        target.info.name = verb
        return typer.main.get_command(target)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name=verb)(target)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit()


@app.callback()
def weft(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Weft takes a language model through its whole life: one thread for every architecture."""


def main() -> None:
    """Entry point. A UserError prints one message on stderr and exits with 2, as a mistyped option does; Ctrl-C exits with 130."""
    debug = "--debug" in sys.argv or bool(os.environ.get("WEFT_DEBUG"))
    if "--debug" in sys.argv:  # accepted anywhere on the line
        sys.argv.remove("--debug")
    try:
        app()
    except UserError as error:
        if debug:
            raise
        print(f"weft: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone, as `weft models | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
