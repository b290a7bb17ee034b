"""The process: from models' names to a server that runs until it is told to stop, and stops well."""

import asyncio
import contextlib
import re
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.device import pick_device
from weft.engine.budget import default_memory
from weft.engine.open import open_model
from weft.errors import UserError
from weft.serve.app import App
from weft.serve.gate import Limits
from weft.serve.metrics import Metrics
from weft.serve.worker import Worker

FIRST_REQUEST_S = 30.0
MAX_FILES = 8192
MODEL_NAME = re.compile(r"([\w.:-]+)=(.+)")


@dataclass(frozen=True)
class Options:
    """How models are served; `device`, `dtype`, `draft`, `fast` and `int8_state` as `open_engine` takes them.

    rows     texts that a model generates at a time.
    memory   bytes for decode state, shared out equally among the models; None lets each take a share of what the machine has left.
    adapters folders of LoRA adapters of the one model, each NAME=DIR or with its folder's name; a request's `model` names one.
    grace_s  time for running answers to end after SIGTERM or SIGINT; a second signal ends them at once.
    """

    device: str = "auto"
    dtype: str = "auto"
    draft: str = "none"
    rows: int = 16
    memory: int | None = None
    grace_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    fast: bool = False
    int8_state: bool = False
    adapters: tuple[str, ...] = ()


def listen(host: str, port: int) -> socket.socket:
    """A socket on which to serve; port 0 takes a free one. Raises UserError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the server cannot listen on {host} port {port}: {reason}. Choose another with --host and --port.") from None


def served_names(models: Sequence[str]) -> dict[str, str]:
    """Names under which models are served -> where they are: NAME=MODEL, or the model's own name or its folder's."""
    names: dict[str, str] = {}
    for given in models:
        match = None if Path(given).exists() else MODEL_NAME.fullmatch(given)
        name, source = match.groups() if match else (Path(given).resolve().name if Path(given).exists() else given, given)
        if name in names:
            raise UserError(f"two models would be served as '{name}'; give one another name: NAME={given}.")
        names[name] = source
    return names


def _adapter_names(given: Sequence[str]) -> dict[str, str]:
    """Names of adapters -> their folders: NAME=DIR, or the folder's own name."""
    names: dict[str, str] = {}
    for each in given:
        match = None if Path(each).exists() else MODEL_NAME.fullmatch(each)
        name, folder = match.groups() if match else (Path(each).resolve().name, each)
        if name in names:
            raise UserError(f"two adapters would be served as '{name}'; give one another name: NAME={folder}.")
        names[name] = folder
    return names


def open_app(models: Sequence[str], options: Options) -> App:
    """Load the models. Raises UserError where one cannot be had."""
    metrics, workers = Metrics(), {}
    names, adapters = served_names(models), _adapter_names(options.adapters)
    if adapters and len(names) > 1:
        raise UserError(f"--adapter is given and {len(names)} models are served; adapters belong to one model: serve it alone.")
    if clash := set(names) & set(adapters):
        raise UserError(f"a model and an adapter would both be served as '{min(clash)}'; give one another name: NAME=DIR.")
    opened = {
        name: open_model(source, options.device, options.dtype, False, options.draft, options.fast, options.int8_state, adapters or None)
        for name, source in names.items()
    }
    memory = options.memory
    if memory is None and len(opened) > 1:  # shared out when all weights are there
        memory = default_memory(pick_device(options.device))
    share = None if memory is None else memory // len(opened)
    for name, model in opened.items():
        workers[name] = Worker(name, model.engine(options.rows, share), options.rows, options.limits.queue, metrics.of(name))
        workers |= dict.fromkeys(adapters, workers[name])
    return App(workers, options.limits, metrics)


def serve(app: App, listener: socket.socket, options: Options, ready: Callable[[], None]) -> dict[str, Any]:
    """Answer requests until SIGTERM or SIGINT, then finish what runs, for at most the grace time. Returns what was done.

    ready  is called when requests are taken.
    """
    return asyncio.run(_serve(app, listener, options, ready))


async def _serve(app: App, listener: socket.socket, options: Options, ready: Callable[[], None]) -> dict[str, Any]:
    _allow_many_connections()
    config = uvicorn.Config(
        app.asgi,
        http=_Protocol,
        ws="none",
        proxy_headers=False,
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config)
    told = asyncio.Event()
    hurry = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        (hurry if told.is_set() else told).set()

    before = {number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop)) for number in (signal.SIGTERM, signal.SIGINT)}
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if not running.done():
            ready()
        await asyncio.wait({running, asyncio.ensure_future(told.wait())}, return_when=asyncio.FIRST_COMPLETED)
        finished = await _drain(app, options.grace_s, hurry)
        server.should_exit = True
        await running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return {"drained": finished}


async def _drain(app: App, grace_s: float, hurry: asyncio.Event) -> bool:
    """Let running answers end and refuse new ones. Returns whether all ended by themselves."""
    app.gate.draining = True
    loop = asyncio.get_running_loop()
    end = loop.time() + grace_s
    while app.gate.active and loop.time() < end and not hurry.is_set():
        await asyncio.sleep(0.02)
    finished = app.gate.active == 0
    if not finished:
        for worker in app.distinct:
            worker.cancel_all()
        end = loop.time() + 2
        while app.gate.active and loop.time() < end:
            await asyncio.sleep(0.02)
    return finished


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would end the process by the signal once it is done, and not with exit code 0."""

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


class _Protocol(H11Protocol):
    """Closes a connection on which no request has come."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(FIRST_REQUEST_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def _allow_many_connections() -> None:
    """Every connection is a file to the system, and the usual limit of 1024 of them is less than a thousand clients need."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
