"""`weft serve`: answer requests over HTTP, as OpenAI's servers do."""

import dataclasses
import importlib.util
import os
from typing import Annotated

import typer

from weft.cli.console import emit_json, say
from weft.cli.options import EngineOptions, with_groups
from weft.errors import UserError

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


@dataclasses.dataclass(frozen=True)
class AccessOptions:
    """Who may ask, from where."""

    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000
    api_key: Annotated[list[str] | None, typer.Option("--api-key", help="A key that requests must bear; or WEFT_API_KEY.")] = None
    cors: Annotated[list[str] | None, typer.Option("--cors", help="Let pages of this origin ask; may be repeated.")] = None


@dataclasses.dataclass(frozen=True)
class LimitOptions:
    """How much is taken on."""

    rows: Annotated[int, typer.Option("--rows", help="Texts that a model generates at a time.", min=1)] = 16
    queue: Annotated[int, typer.Option("--queue", help="Texts that may wait; more are refused with 429.", min=0)] = 256
    memory: Annotated[float | None, typer.Option("--memory", help="MB for decode state; by default a share of what is left.", min=1)] = None
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that an answer may take.", min=0.001)] = 600.0
    body_limit: Annotated[float, typer.Option("--body-limit", help="Largest request, in MB.", min=0.001)] = 8.0
    grace: Annotated[float, typer.Option("--grace", help="Seconds for running answers to end when told to stop.", min=0)] = 30.0


@with_groups
def serve(
    models: list[str] = typer.Argument(None, help="Pulled names, model folders or GGUF files; NAME=MODEL names one anew."),
    access: AccessOptions = AccessOptions(),
    limits: LimitOptions = LimitOptions(),
    run: EngineOptions = EngineOptions(),
    json: bool = typer.Option(False, "--json", help="Print one JSON object when ready, and one at the end."),
) -> None:
    """Answer requests over HTTP, as OpenAI's servers do, with a chat page at /."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}; install them with: pip install 'weft[serve]'")
    from weft.serve import server
    from weft.serve.gate import Limits, is_local

    listener = server.listen(access.host, access.port)
    given = Limits(
        api_keys=_keys(access.api_key),
        cors=tuple(access.cors or ()),
        body_bytes=_bytes(limits.body_limit) or 0,
        request_s=limits.timeout,
        queue=limits.queue,
        local_only=is_local(access.host),
    )
    state = _bytes(limits.memory)
    adapters = tuple(run.adapter or ())
    options = server.Options(run.device, run.dtype, run.draft, limits.rows, state, limits.grace, given, run.fast, run.int8_state, adapters)
    app = server.open_app(models or ["smollm2-135m"], options)
    where, names = server.address(listener), list(app.workers)

    def ready() -> None:
        say(f"{', '.join(names)} at {where}/v1, a page to chat at {where}/; Ctrl-C stops.")
        if json:
            emit_json({"event": "ready", "address": where, "models": names})

    outcome = server.serve(app, listener, options, ready)
    say("stopped." if outcome["drained"] else "stopped; answers that took longer than the grace time were cut.")
    if json:
        emit_json({"event": "stopped", "address": where, **outcome})


def _bytes(megabytes: float | None) -> int | None:
    return None if megabytes is None else int(megabytes * 1_000_000)


def _keys(given: list[str] | None) -> tuple[str, ...]:
    keys = tuple(given or ()) or tuple(filter(None, [os.environ.get("WEFT_API_KEY")]))
    if any(not key.strip() or not key.isascii() for key in keys):
        raise UserError("an API key is empty or has characters that are not ASCII; give one that a header can carry.")
    return keys
