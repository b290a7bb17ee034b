"""The thread that runs an engine: failures of the model stay with the requests they hit, and who goes away leaves nothing."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from engine_cases import llama

from weft.engine import Engine, Request, SamplingParams
from weft.errors import UserError
from weft.serve.embeddings import embed
from weft.serve.errors import ApiError
from weft.serve.metrics import Metrics
from weft.serve.worker import Worker
from weft.tokenizer.train import train_tokenizer

TOKENIZER = train_tokenizer("bpe", ["the quick brown fox jumps over the lazy dog " * 9], 280)
LONG = Request("the quick", SamplingParams(max_tokens=100, ignore_eos=True))


@pytest.fixture
def worker():
    worker = Worker("small", Engine(llama(TOKENIZER.vocab_size), TOKENIZER, rows=2), 2, 2, Metrics().of("small"))
    yield worker
    worker.stop()


def within(worker, work):
    """Run a coroutine beside the worker's thread."""

    async def main():
        worker.start(asyncio.get_running_loop())
        return await asyncio.wait_for(work(), 30)

    return asyncio.run(main())


async def text_of(worker, request):
    ticket = await worker.submit(request)
    (result,) = [event.result async for event in ticket.stream() if event.result is not None]
    return result.text


async def settled(worker):
    while worker.engine.busy:
        await asyncio.sleep(0.01)


def test_a_failing_step_fails_those_who_run_and_nobody_later(worker, capfd):
    step, failures = worker.engine.step, [RuntimeError("out of memory")]

    def failing():
        if worker.engine.stats.generated_tokens >= 5 and failures:
            raise failures.pop()
        return step()

    async def work():
        alone = await text_of(worker, LONG)
        worker.engine.step = failing
        outcomes = await asyncio.gather(text_of(worker, LONG), text_of(worker, LONG), return_exceptions=True)
        assert [(outcome.status, "out of memory" in outcome.message) for outcome in outcomes] == [(500, False)] * 2
        await settled(worker)
        assert await text_of(worker, LONG) == alone
        assert worker.failure is None

    within(worker, work)
    assert "RuntimeError: out of memory" in capfd.readouterr().err  # the log has what the client need not know


def test_an_engine_that_cannot_even_drop_requests_is_given_up(worker, capfd):
    def broken(*_):
        raise RuntimeError("state is lost")

    async def work():
        ticket = await worker.submit(LONG)
        worker.engine.step = worker.engine.cancel = broken
        with pytest.raises(ApiError) as caught:
            [event async for event in ticket.stream()]
        assert caught.value.status == 500
        with pytest.raises(ApiError) as caught, worker.place(1):
            pass
        assert (caught.value.status, worker.failure) == (503, "RuntimeError")

    within(worker, work)
    assert "state is lost" in capfd.readouterr().err


def test_what_the_engine_refuses_the_caller_hears(worker):
    async def work():
        with pytest.raises(UserError, match="has no tokens"):
            await worker.submit(Request([], SamplingParams()))
        with pytest.raises(UserError, match="the model's context is 128"):
            await worker.submit(Request([1] * 129, SamplingParams()))
        assert len(await text_of(worker, LONG)) > 0

    within(worker, work)


def test_who_goes_away_leaves_nothing(worker):
    async def work():
        ticket = await worker.submit(LONG)
        worker.cancel(ticket)
        task = asyncio.ensure_future(worker.submit(LONG))
        await asyncio.sleep(0)
        task.cancel()
        job = asyncio.ensure_future(worker.run(embed(worker.engine.model, [1] * 100)))
        await asyncio.sleep(0)
        job.cancel()
        assert len(await text_of(worker, LONG)) > 0  # commands are taken in order: those before it have been carried out
        await settled(worker)
        assert worker._tickets == {}

    within(worker, work)


def test_places_are_counted(worker):
    with worker.place(3):
        assert worker.open == 3
        with pytest.raises(ApiError) as caught, worker.place(2):
            pass
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
        with pytest.raises(ApiError) as caught, worker.place(5):
            pass
        assert caught.value.status == 400  # it would never fit
        with worker.place(1):
            assert worker.open == 4
    assert worker.open == 0


def test_an_embedding_is_computed_between_steps(worker):
    async def work():
        ids = TOKENIZER.encode("the quick brown fox " * 4)
        stream = asyncio.ensure_future(text_of(worker, LONG))
        vector = await worker.run(embed(worker.engine.model, ids))
        assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
        assert vector != pytest.approx(await worker.run(embed(worker.engine.model, ids[:-1])), abs=1e-6)
        await stream

    within(worker, work)
