"""The application: paths, what they take, and how errors are answered."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from weft import __version__
from weft.errors import UserError, nearest
from weft.serve import page_files
from weft.serve.endpoints import Endpoints
from weft.serve.errors import ApiError, Json
from weft.serve.gate import Gate, Limits
from weft.serve.metrics import Metrics
from weft.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from weft.serve.worker import Worker


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """How every error is answered."""

    error: ErrorObject


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


class App:
    """The server's ASGI application, and what the process around it needs to know.

    workers  models by the names under which they are served; an adapter's name has the worker of its base.
    """

    def __init__(self, workers: dict[str, Worker], limits: Limits, metrics: Metrics) -> None:
        self.workers, self.metrics = workers, metrics
        self.distinct = list(dict.fromkeys(workers.values()))
        metrics.workers.extend(self.distinct)
        inner = FastAPI(title="Weft", version=__version__, docs_url=None, redoc_url=None, lifespan=self._lifespan)
        self._route(inner, Endpoints(workers, limits))
        _answer_errors(inner)
        pages = page_files.add_routes(inner)
        self.gate = Gate(inner, limits, metrics, {"/health", *pages})
        self.asgi: Any = self.gate
        if limits.cors:
            headers = ["authorization", "content-type"]
            self.asgi = CORSMiddleware(self.gate, list(limits.cors), allow_methods=["GET", "POST"], allow_headers=headers)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        for worker in self.distinct:
            worker.start(loop)
        yield
        for worker in self.distinct:
            await asyncio.to_thread(worker.stop)

    def _route(self, inner: FastAPI, endpoints: Endpoints) -> None:
        def post(path: str, handler: Any) -> None:
            inner.add_api_route(path, handler, methods=["POST"], responses=ERRORS, response_model=None)

        def get(path: str, handler: Any) -> None:
            inner.add_api_route(path, handler, methods=["GET"], responses=ERRORS, response_model=None)

        async def chat(body: ChatRequest, request: Request) -> Any:
            return await endpoints.chat(body, request)

        async def completions(body: CompletionRequest, request: Request) -> Any:
            return await endpoints.completions(body, request)

        async def embeddings(body: EmbeddingRequest, request: Request) -> Any:
            return await endpoints.embeddings(body, request)

        async def tokenize(body: TokenizeRequest) -> Any:
            return await endpoints.tokenize(body)

        async def detokenize(body: DetokenizeRequest) -> Any:
            return await endpoints.detokenize(body)

        post("/v1/chat/completions", chat)
        post("/v1/completions", completions)
        post("/v1/embeddings", embeddings)
        post("/tokenize", tokenize)
        post("/detokenize", detokenize)
        get("/v1/models", endpoints.models)
        get("/v1/models/{name:path}", endpoints.one_model)
        get("/health", self._health)
        get("/metrics", self._metrics)

    async def _health(self) -> Response:
        """200 while requests are taken; 503 while the server shuts down or a model has failed."""
        failed = [name for name, worker in self.workers.items() if worker.failure]
        status = "draining" if self.gate.draining else "failed" if failed else "ok"
        return Json({"status": status, "models": list(self.workers), "failed": failed}, 200 if status == "ok" else 503)

    async def _metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _answer_errors(inner: FastAPI) -> None:
    async def api_error(_: Request, error: Any) -> Response:
        return error.response()

    async def user_error(_: Request, error: Any) -> Response:
        return ApiError(400, str(error)).response()

    async def invalid(_: Request, error: Any) -> Response:
        return validation_error(error).response()

    async def http_error(request: Request, error: Any) -> Response:
        messages = {404: f"there is nothing at {request.url.path}.", 405: f"{request.method} is not allowed at {request.url.path}."}
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def own_fault(_: Request, error: Any) -> Response:
        return ApiError(500, f"the server failed on this request ({type(error).__name__}); its log has the details.").response()

    inner.add_exception_handler(Exception, own_fault)
    inner.add_exception_handler(ApiError, api_error)
    inner.add_exception_handler(UserError, user_error)
    inner.add_exception_handler(RequestValidationError, invalid)
    inner.add_exception_handler(HTTPException, http_error)


def validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by the field's name."""
    first = error.errors()[0]
    parts = [part for part in first["loc"][1:] if not str(part).startswith("<")]
    name = re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in parts)) or None
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}.", "invalid_json")
    if not parts:
        return ApiError(400, "the body must be a JSON object, sent as application/json.", "invalid_body")
    if kind == "extra_forbidden":
        return ApiError(400, f"the field {name} is not supported here; leave it out.{_known(parts)}", "unsupported_field", name)
    if kind == "missing":
        return ApiError(400, f"the field {name} is missing.", "missing_field", name)
    return ApiError(400, f"the field {name} cannot be used: {first['msg'][0].lower()}{first['msg'][1:]}.", "invalid_value", name)


def _known(parts: list[Any]) -> str:
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *EmbeddingRequest.model_fields}
    return nearest(str(parts[-1]), fields) if len(parts) == 1 else ""
