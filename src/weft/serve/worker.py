"""One model at work in a thread of its own, the only one that touches the engine; the asyncio side submits requests and gets events."""

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from weft.engine import Engine, Event, Request, Result
from weft.serve.errors import ApiError, busy
from weft.serve.metrics import ModelMetrics

T = TypeVar("T")
Job = Generator[None, None, Any]
STATS_S = 0.1


class Ticket:
    """A request in the engine, as the asyncio side sees it."""

    def __init__(self, sequences: int) -> None:
        self.sequences = self.unfinished = sequences
        self.begun = time.monotonic()
        self.number = -1
        self.cancelled = False
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    async def stream(self) -> AsyncIterator[Event]:
        """Events until every continuation has its result. Raises ApiError where the engine failed."""
        left = self.sequences
        while left:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            left -= event.result is not None
            yield event


class Worker:
    """Runs an engine.

    queue_limit  sequences that may wait beyond the engine's rows; more are refused with 429.
    """

    def __init__(self, name: str, engine: Engine, rows: int, queue_limit: int, metrics: ModelMetrics) -> None:
        assert engine.tokenizer is not None
        self.name, self.engine, self.tokenizer, self.metrics = name, engine, engine.tokenizer, metrics
        shared = engine.model.adapters
        self.adapters = shared.names if shared is not None else ()  # names under which its model is served with one of them
        self.created = int(time.time())
        self.open = 0  # sequences that were let in and are not finished
        self.rows, self.limit = rows, rows + queue_limit
        self.failure: str | None = None
        self.stats = engine.stats  # as the engine's thread last saw them
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._jobs: list[tuple[Job, Future[Any]]] = []
        self._stopped = False
        self._mean_s = 1.0
        self._looked = 0.0
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a request for the model of this name asks for; None for the base."""
        return name if name in self.adapters else None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    # The asyncio side.

    @contextmanager
    def place(self, sequences: int) -> Iterator[None]:
        """Room for a request while it is prepared and runs. Raises ApiError 429 where there is none."""
        self._check_failure()
        if sequences > self.limit:
            raise ApiError(400, f"the request asks for {sequences} texts at once and this server takes {self.limit}; ask for fewer.")
        if self.open + sequences > self.limit:
            self.metrics.refused.inc()
            waiting = max(1, self.open - self.rows) / self.rows
            raise busy(min(60, max(1, round(self._mean_s * waiting))))
        self.open += sequences
        begun = time.monotonic()
        try:
            yield
        finally:
            self.open -= sequences
            self._mean_s += 0.1 * (time.monotonic() - begun - self._mean_s)

    def _check_failure(self) -> None:
        if self.failure is not None:
            raise ApiError(503, f"the model {self.name} has failed ({self.failure}); restart the server.", "model_failed")

    async def submit(self, request: Request) -> Ticket:
        """Hand a request to the engine. Raises UserError as `Engine.submit` does."""
        ticket = Ticket(request.params.n)

        def enter() -> None:
            if ticket.cancelled:
                return
            self._check_failure()  # it may have failed while the request was prepared
            ticket.number = self.engine.submit(request)
            self._tickets[ticket.number] = ticket

        try:
            await self._call(enter)
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drop a request, if it is not finished; nobody listens to it any more."""
        ticket.cancelled = True

        def leave() -> None:
            if self._tickets.pop(ticket.number, None) is not None:
                self.engine.cancel(ticket.number)
                self.metrics.cancelled.inc()

        self._commands.put(leave)

    async def run(self, job: Job) -> Any:
        """The value of a job that is done in steps between those of the engine. A job whose caller goes away is closed."""
        done: Future[Any] = Future()
        self._commands.put(lambda: self._jobs.append((job, done)))
        return await asyncio.wrap_future(done)

    async def _call(self, function: Callable[[], T]) -> T:
        done: Future[T] = Future()

        self._commands.put(lambda: _settle(done, function))
        # Shielded: a caller that goes away must not leave a half-made call behind.
        return await asyncio.shield(asyncio.wrap_future(done))

    def cancel_all(self) -> None:
        """End every request where it is; its listeners get what there is, as cancelled."""

        def end() -> None:
            for number, ticket in list(self._tickets.items()):
                results = self.engine.cancel(number)
                self._send([(ticket, Event(number, result.index, None, "", None, result)) for result in results])
            self._tickets.clear()

        self._commands.put(end)

    def stop(self) -> None:
        """End the thread."""

        def end() -> None:
            self._stopped = True

        self._commands.put(end)
        if self._thread.ident is not None:
            self._thread.join(timeout=10)

    # The engine's side.

    def _run(self) -> None:
        while not self._stopped:
            self._look()
            self._take_commands()
            if self._jobs:
                self._advance_job()
            if self._working and not self._stopped:
                try:
                    events = self.engine.step()
                except Exception as error:  # whatever a model does must not end the server: its requests fail, others go on
                    self._fail_all(error)
                else:
                    self._dispatch(events)

    @property
    def _working(self) -> bool:
        return self.engine.busy and self.failure is None

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked > STATS_S or not self.engine.busy:
            self.stats, self._looked = self.engine.stats, now

    def _take_commands(self) -> None:
        wait = not (self._working or self._jobs)
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            try:
                command()
            except Exception as error:  # only what ends requests can raise here, and then the engine's state is not to be trusted
                self._fail_all(error)
            wait = False

    def _advance_job(self) -> None:
        job, done = self._jobs.pop(0)
        if done.cancelled():
            job.close()
            return
        try:
            next(job)
        except StopIteration as end:
            value = end.value
            _settle(done, lambda: value)
        except Exception as error:
            _settle(done, error)
        else:
            self._jobs.append((job, done))

    def _dispatch(self, events: list[Event]) -> None:
        now = time.monotonic()
        found = []
        for event in events:
            ticket = self._tickets.get(event.request)
            if ticket is None:
                continue
            found.append((ticket, event))
            if ticket.begun and event.token is not None:
                self.metrics.first_token.observe(now - ticket.begun)
                ticket.begun = 0.0
            if event.result is not None:
                self._finish(ticket, event.result)
        self.metrics.count_tokens(sum(event.token is not None for _, event in found), now)
        self._send(found)

    def _finish(self, ticket: Ticket, result: Result) -> None:
        self.metrics.finished(result)
        ticket.unfinished -= 1
        if ticket.unfinished == 0:
            del self._tickets[ticket.number]

    def _send(self, found: list[tuple[Ticket, Any]]) -> None:
        """Give events to those who wait for them: one hop to the other thread for all."""
        if not found:
            return

        def hand_out() -> None:
            for ticket, event in found:
                ticket.events.put_nowait(event)

        try:
            self._loop.call_soon_threadsafe(hand_out)
        except RuntimeError:  # the loop has closed: nobody is left to listen
            self._stopped = True

    def _fail_all(self, error: Exception) -> None:
        answer = ApiError(500, f"the model failed while generating ({type(error).__name__}); the request was dropped.", "engine_error")
        traceback.print_exception(error)
        failed = list(self._tickets.values())
        self._tickets.clear()
        self.metrics.failed.inc(len(failed))
        try:
            for ticket in failed:
                self.engine.cancel(ticket.number)
        except Exception as second:
            self.failure = f"{type(second).__name__}"
        self._send([(ticket, answer) for ticket in failed])


def _settle(done: "Future[Any]", outcome: Callable[[], Any] | Exception) -> None:
    """Give a future its value or its error, unless the one who waited has gone."""
    try:
        value = outcome if isinstance(outcome, Exception) else outcome()
    except Exception as error:
        value = error
    if done.set_running_or_notify_cancel():
        if isinstance(value, Exception):
            done.set_exception(value)
        else:
            done.set_result(value)
