"""What each path does with a request."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from weft.engine import Event
from weft.errors import UserError, nearest
from weft.serve import answers, embeddings, prepare, schema
from weft.serve.answers import Choice, Frame
from weft.serve.errors import ApiError, Json
from weft.serve.gate import CLIENT_GONE, Gone, Limits, until_gone
from weft.serve.prepare import Prepared
from weft.serve.stream import EventStream, as_api_error
from weft.serve.worker import Ticket, Worker

Chunks = AsyncGenerator[dict[str, Any], None]


class Endpoints:
    """The handlers of one server.

    workers  by the names under which models are served.
    """

    def __init__(self, workers: dict[str, Worker], limits: Limits) -> None:
        self.workers, self.limits = workers, limits

    def worker(self, name: str | None) -> Worker:
        if name is None and len(set(self.workers.values())) == 1:
            return next(iter(self.workers.values()))
        if name is None:
            raise ApiError(400, f"the request names no model; this server has {', '.join(self.workers)}.", param="model")
        if name not in self.workers:
            message = f"there is no model {name!r} here; this server has {', '.join(self.workers)}.{nearest(name, self.workers)}"
            raise ApiError(404, message, "model_not_found", "model")
        return self.workers[name]

    # Chat and completions.

    async def chat(self, body: schema.ChatRequest, http: HttpRequest) -> Any:
        """OpenAI's chat completions."""
        worker = self.worker(body.model)
        count = body.n or 1
        include = bool(body.stream_options and body.stream_options.include_usage)
        logprobs = bool(body.logprobs)
        if body.stream:
            source = self._stream_chat(worker, body, count, logprobs)
            return EventStream(answers.with_usage(source, include), self.limits.request_s)

        async def answer() -> Json:
            with worker.place(count):
                prepared = await run_in_threadpool(prepare.chat, worker, body)
                choices = await self._collect(worker, [prepared])
            return Json(answers.chat_answer(Frame(body.model, worker.tokenizer), choices, logprobs))

        return await self._within_limits(http, answer())

    async def _stream_chat(self, worker: Worker, body: schema.ChatRequest, count: int, logprobs: bool) -> Chunks:
        frame = Frame(body.model, worker.tokenizer)
        with worker.place(count):
            prepared = await run_in_threadpool(prepare.chat, worker, body)
            choices = _choices(worker, [prepared])
            begun: set[int] = set()
            async with aclosing(self._events(worker, [prepared])) as events:
                async for index, event in events:
                    calls_before = len(choices[index].calls)
                    piece = choices[index].take(event)
                    for chunk in answers.chat_chunks(frame, index, piece, index not in begun, calls_before, logprobs):
                        yield chunk
                    begun.add(index)
        results = [choice.result for choice in choices if choice.result is not None]
        yield frame.envelope("chatcmpl", "chat.completion.chunk") | {"choices": [], "usage": answers.usage(results)}

    async def completions(self, body: schema.CompletionRequest, http: HttpRequest) -> Any:
        """OpenAI's text completions."""
        worker = self.worker(body.model)
        texts = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
        count = (body.n or 1) * (len(body.prompt) if texts else 1)
        include = bool(body.stream_options and body.stream_options.include_usage)
        if body.stream:
            return EventStream(answers.with_usage(self._stream_completions(worker, body, count), include), self.limits.request_s)

        async def answer() -> Json:
            with worker.place(count):
                prepared = await run_in_threadpool(prepare.completions, worker, body)
                choices = await self._collect(worker, prepared)
            return Json(answers.completion_answer(Frame(body.model, worker.tokenizer), choices, body.logprobs))

        return await self._within_limits(http, answer())

    async def _stream_completions(self, worker: Worker, body: schema.CompletionRequest, count: int) -> Chunks:
        frame = Frame(body.model, worker.tokenizer)
        with worker.place(count):
            prepared = await run_in_threadpool(prepare.completions, worker, body)
            choices = _choices(worker, prepared)
            async with aclosing(self._events(worker, prepared)) as events:
                async for index, event in events:
                    piece = choices[index].take(event)
                    if piece.text or piece.logprobs or piece.finish_reason:
                        yield answers.completion_chunk(frame, index, piece, body.logprobs)
        results = [choice.result for choice in choices if choice.result is not None]
        yield frame.envelope("cmpl", "text_completion") | {"choices": [], "usage": answers.usage(results)}

    async def _collect(self, worker: Worker, prepared: Sequence[Prepared]) -> list[Choice]:
        choices = _choices(worker, prepared)
        async with aclosing(self._events(worker, prepared)) as events:
            async for index, event in events:
                choices[index].take(event)
        return choices

    async def _events(self, worker: Worker, prepared: Sequence[Prepared]) -> AsyncGenerator[tuple[int, Event], None]:
        """Events of several requests with the index of the choice they belong to. The requests end with whoever listens."""
        tickets: list[Ticket] = []
        try:
            for each in prepared:
                tickets.append(await worker.submit(each.request))
            async with aclosing(_merged(tickets)) as events:
                async for number, event in events:
                    if event.result is not None:
                        _check_result(event, prepared[number])
                    yield number * prepared[0].request.params.n + event.index, event
        finally:
            for ticket in tickets:
                worker.cancel(ticket)

    async def _within_limits(self, http: HttpRequest, work: Any) -> Any:
        """An answer, unless its client goes away or its time is over."""
        limit = self.limits.request_s
        try:
            return await until_gone(http.receive, asyncio.wait_for(work, limit))
        except Gone:
            return Response(status_code=CLIENT_GONE)
        except (TimeoutError, UserError) as error:
            raise as_api_error(error, limit) from None

    # Embeddings.

    async def embeddings(self, body: schema.EmbeddingRequest, http: HttpRequest) -> Any:
        """OpenAI's embeddings: mean of the final hidden states, scaled to length 1."""
        worker = self.worker(body.model)

        async def answer() -> Json:
            with worker.place(1):
                prompts = await run_in_threadpool(prepare.prompt_ids, worker, body.input, "input")
                for ids in prompts:
                    prepare.check_length(worker, ids, "input", room=0)
                adapter = worker.engine.adapter_number(worker.adapter_of(body.model))
                vectors = [await worker.run(embeddings.embed(worker.engine.model, ids, adapter)) for ids in prompts]
            data = [
                {"object": "embedding", "index": i, "embedding": vector if body.encoding_format != "base64" else embeddings.encoded(vector)}
                for i, vector in enumerate(vectors)
            ]
            count = sum(map(len, prompts))
            return Json({"object": "list", "data": data, "model": body.model, "usage": {"prompt_tokens": count, "total_tokens": count}})

        return await self._within_limits(http, answer())

    # Models and tokens.

    def model(self, name: str) -> dict[str, Any]:
        worker = self.worker(name)
        base = {"parent": worker.name} if worker.adapter_of(name) else {}
        return {
            "id": name,
            "object": "model",
            "created": worker.created,
            "owned_by": "weft",
            "context_length": worker.engine.context,
            "chat": worker.tokenizer.chat_template is not None,
            **base,
        }

    async def models(self) -> Any:
        """The models that are served, with their context lengths, and whether they have a chat template."""
        return Json({"object": "list", "data": [self.model(name) for name in self.workers]})

    async def one_model(self, name: str) -> Any:
        """One model that is served."""
        return Json(self.model(name))

    async def tokenize(self, body: schema.TokenizeRequest) -> Any:
        """The tokens of a text, or of a conversation as the model would read it."""
        worker = self.worker(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages.", param="prompt")

        def work() -> list[int]:
            if body.messages is not None:
                return prepare.render(worker.tokenizer, body.messages, add_generation_prompt=body.add_generation_prompt)
            assert body.prompt is not None
            return worker.tokenizer.encode(body.prompt)

        ids = await run_in_threadpool(work)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": worker.engine.context, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [worker.tokenizer.token(token) for token in ids]
        return Json(answer)

    async def detokenize(self, body: schema.DetokenizeRequest) -> Any:
        """The text of tokens."""
        worker = self.worker(body.model)
        prepare.check_ids(worker, body.tokens, "tokens")
        return Json({"prompt": await run_in_threadpool(worker.tokenizer.decode, body.tokens)})


def _choices(worker: Worker, prepared: Sequence[Prepared]) -> list[Choice]:
    params = [(each, each.request.params) for each in prepared]
    return [Choice(worker.tokenizer, each.calls, its.constrained) for each, its in params for _ in range(its.n)]


def _check_result(event: Event, prepared: Prepared) -> None:
    result = event.result
    assert result is not None
    if result.finish_reason == "cancelled":
        raise ApiError(503, "the server shut down before the answer was complete; try again.", "shut_down", headers={"Retry-After": "5"})
    if result.finish_reason == "error":
        status = 400 if prepared.request.params.constrained and result.ids else 500
        raise ApiError(status, result.error or "the model failed on this request.", "generation_failed")


async def _merged(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of several tickets as they come, each with its ticket's number."""
    if len(tickets) == 1:
        async for event in tickets[0].stream():
            yield 0, event
        return
    shared: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

    async def forward(number: int, ticket: Ticket) -> None:
        try:
            async for event in ticket.stream():
                shared.put_nowait((number, event))
            shared.put_nowait((number, None))
        except Exception as error:
            shared.put_nowait((number, error))

    tasks = [asyncio.ensure_future(forward(number, ticket)) for number, ticket in enumerate(tickets)]
    try:
        left = len(tasks)
        while left:
            number, found = await shared.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield number, found
    finally:
        for task in tasks:
            task.cancel()
