"""What every HTTP request passes first: host, key, state of the server, and limits on its body. Plain ASGI around the application."""

import asyncio
import hmac
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.serve.errors import ApiError, draining
from weft.serve.metrics import Metrics

CLIENT_GONE = 499  # as nginx counts an answer that nobody waits for any more
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    return host in LOCAL_HOSTS or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    api_keys      one of them must be given as a bearer token; without any everybody may ask.
    cors          origins whose pages may ask; none by default.
    body_bytes    largest request body.
    body_s        time for a body to arrive.
    request_s     time for an answer.
    queue         texts that may wait for a row, a model.
    local_only    answer only to names of this machine, so that no page of another site can reach it by a name of its own (DNS rebinding).
    """

    api_keys: Sequence[str] = ()
    cors: Sequence[str] = ()
    body_bytes: int = 8 * 1024 * 1024
    body_s: float = 30.0
    request_s: float = 600.0
    queue: int = 256
    local_only: bool = True


class Gate:
    """Refuses what must not come in, and hands on requests whose body has arrived whole.

    public  paths that need no key.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, public: Collection[str]) -> None:
        self.app, self.limits, self.metrics, self.public = app, limits, metrics, public
        self.draining = False
        self.active = 0
        self._keys = [key.encode() for key in limits.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.active += 1
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self.app(scope, _replay(body, receive), noting)
        except ApiError as error:
            if not status:
                if error.status in (408, 413):  # the rest of the body is not read, so the connection cannot be used again
                    error.headers["Connection"] = "close"
                await error.response()(scope, receive, noting)
        except Gone:
            pass
        finally:
            self.active -= 1
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.requests.labels(path, str(status or CLIENT_GONE)).inc()
            self.metrics.latency.labels(path).observe(time.monotonic() - begun)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        path = scope["path"]
        if self.limits.local_only and not is_local(_host(headers.get(b"host", b""))):
            raise ApiError(403, "this server answers only to this machine's own names, such as localhost; serve with --host to be reached "
                           "by others.", "host_not_allowed")  # fmt: skip
        if self._keys and path not in self.public and scope["method"] != "OPTIONS":
            self._check_key(headers.get(b"authorization", b""))
        if self.draining and path != "/health":
            raise draining()

    def _check_key(self, given: bytes) -> None:
        kind, _, key = given.partition(b" ")
        # Every key is compared, in time that does not depend on where they differ.
        fits = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if kind.lower() != b"bearer" or not any(fits):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self.limits.body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limit:
            raise self._too_large(length.decode()[:20])
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise self._too_large(f"over {limit}")
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.limits.body_s:g} s; send it faster.", "body_timeout") from None
        return b"".join(parts)

    def _too_large(self, size: str) -> ApiError:
        return ApiError(413, f"the body has {size} bytes and at most {self.limits.body_bytes} are taken; send less.", "body_too_large")


class Gone(Exception):
    """The client went away."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that has already been read, and then what else comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(header: bytes) -> str:
    """The name in a Host header, without the port."""
    return re.sub(r":\d*$", "", header.decode("latin-1")).lower() if not header.endswith(b"]") else header.decode("latin-1").lower()


async def until_gone(receive: Receive, work: Any) -> Any:
    """The result of a coroutine, which is cancelled when the client goes away. Raises Gone then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
