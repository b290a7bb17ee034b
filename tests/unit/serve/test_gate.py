"""The gate before the application: slow and large bodies, keys, names, and a server that stops."""

import asyncio
import json

import pytest

from weft.serve.gate import Gate, Gone, Limits, until_gone
from weft.serve.metrics import Metrics


async def echo(scope, receive, send):
    """Answers with the body it was given."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def ask(limits, parts, path="/v1/models", headers=(), gate=None):
    """Status and body of an answer to a body that comes in parts; a part that is a number is a pause in seconds."""
    gate = gate or Gate(echo, limits, Metrics(), {"/health"})
    sent, coming = [], list(parts)

    async def receive():
        while coming and isinstance(coming[0], float):
            await asyncio.sleep(coming.pop(0))
        if coming and coming[0] is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": coming.pop(0), "more_body": bool(coming)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"host", b"localhost:8000"), *headers]}
    asyncio.run(gate(scope, receive, send))
    if not sent:
        return None, b""
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def code(answer):
    return answer[0], json.loads(answer[1])["error"]["code"]


def test_a_body_comes_whole_or_not_at_all():
    limits = Limits(body_bytes=10, body_s=0.05)
    assert ask(limits, [b"12345", b"67890"]) == (200, b"1234567890")
    assert code(ask(limits, [b"12345", b"678901"])) == (413, "body_too_large")
    assert code(ask(limits, [b"1"], headers=[(b"content-length", b"11")])) == (413, "body_too_large")
    assert code(ask(limits, [b"1"], headers=[(b"content-length", b"9" * 5000)])) == (413, "body_too_large")
    assert code(ask(limits, [b"1", 1.0, b"2"])) == (408, "body_timeout")
    assert ask(limits, [b"1", None]) == (None, b"")  # the client went away: nobody is left to answer


@pytest.mark.parametrize(("header", "status"), [
    (b"Bearer one", 200), (b"bearer two", 200), (b"Bearer three", 401), (b"Bearer", 401), (b"Bearer  ", 401), (b"Basic one", 401),
    (b"Bearer on\xe9", 401), (b"one", 401),
])  # fmt: skip
def test_keys(header, status):
    limits = Limits(api_keys=("one", "two"))
    assert ask(limits, [b""], headers=[(b"authorization", header)])[0] == status
    assert ask(limits, [b""])[0] == 401
    assert ask(limits, [b""], path="/health")[0] == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.0.0.2:80", "[::1]:8000", "[::1]"])
def test_this_machine_by_its_own_names(host):
    scope_host = [(b"host", host.encode())]
    assert ask(Limits(), [b""], headers=scope_host)[0] == 200
    for other in ("example.com", f"{host.split(':')[0]}.example.com", "localhost.", "", "127.0.0.1.example.com:80"):
        assert code(ask(Limits(), [b""], headers=[(b"host", other.encode())])) == (403, "host_not_allowed")
        assert ask(Limits(local_only=False), [b""], headers=[(b"host", other.encode())])[0] == 200


def test_a_server_that_stops_lets_nobody_in():
    gate = Gate(echo, Limits(), Metrics(), {"/health"})
    gate.draining = True
    assert code(ask(Limits(), [b""], gate=gate)) == (503, "draining")
    assert ask(Limits(), [b""], path="/health", gate=gate)[0] == 200
    assert gate.active == 0


def test_work_ends_with_its_client():
    ended = []

    async def work():
        try:
            await asyncio.sleep(10)
        finally:
            ended.append(True)

    async def leave():
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def stay():
        await asyncio.sleep(10)

    async def quick():
        return 7

    with pytest.raises(Gone):
        asyncio.run(until_gone(leave, work()))
    assert ended == [True]
    assert asyncio.run(until_gone(stay, quick())) == 7
