"""What goes wrong in a request, in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an HTTP status and an error object.

    param  which field is meant, as `messages[0].role`.
    code   what a program can tell it by.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> "Json":
        return Json(self.body, self.status, self.headers)


class Json(Response):
    """A JSON answer. Text that is no Unicode, which only a client's own words can bring in, is answered with U+FFFD in its place."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(content, status_code, headers)

    def render(self, content: Any) -> bytes:
        return dumps(content)


def dumps(content: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def busy(seconds: int) -> ApiError:
    message = f"the server is full: as many requests wait as may. Try again in {seconds} s."
    return ApiError(429, message, "queue_full", headers={"Retry-After": str(seconds)})


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down; try again later or elsewhere.", "draining", headers={"Retry-After": "5"})
