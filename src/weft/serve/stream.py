"""Answers that are sent as server-sent events while they are made."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.errors import UserError
from weft.serve.answers import event
from weft.serve.errors import ApiError
from weft.serve.gate import Gone, until_gone

# A proxy that gathers a whole answer before it hands it on would defeat the purpose.
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """A response of server-sent events. Its source is closed when the client goes away or its time is over.

    An error before the first event is answered with its own status; a later one is an event `{"error": …}`, after which the stream ends.
    """

    def __init__(self, source: AsyncGenerator[bytes, None], limit_s: float) -> None:
        super().__init__(None, 200, HEADERS, "text/event-stream")
        del self.headers["content-length"]
        self._source, self._limit_s = source, limit_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(Gone):
                await until_gone(receive, self._pump(send))
        finally:
            await self._source.aclose()

    async def _pump(self, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                async for chunk in self._source:
                    if not self._started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        self._started = True
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (ApiError, UserError, TimeoutError) as error:
            answer = as_api_error(error, self._limit_s)
            if not self._started:
                raise answer from None
            await self._source.aclose()  # a client that does not read may hold up the next line, but not the place of others
            await send({"type": "http.response.body", "body": event(answer.body), "more_body": True})
        except OSError:
            raise Gone from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_api_error(error: Exception, limit_s: float) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, f"the answer took longer than this server's limit of {limit_s:g} s; ask for fewer tokens.", "timeout")
    return ApiError(400, str(error))
