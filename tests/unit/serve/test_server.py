"""The process's own parts: silent connections, sockets, and what counts as this machine."""

import asyncio

import pytest
import uvicorn

from weft.errors import UserError
from weft.serve import server
from weft.serve.gate import is_local


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    monkeypatch.setattr(server, "FIRST_REQUEST_S", 0.3)

    async def talk():
        listener = server.listen("127.0.0.1", 0)
        config = uvicorn.Config(hello, http=server._Protocol, lifespan="off", log_level="error", timeout_keep_alive=60)
        running = server._Server(config)
        task = asyncio.ensure_future(running.serve(sockets=[listener]))
        host, port = listener.getsockname()
        silent, _keep_open = await asyncio.open_connection(host, port)
        reader, writer = await asyncio.open_connection(host, port)
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writer.write(request)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert await asyncio.wait_for(silent.read(), 10) == b""
        await reader.readuntil(b"hi")
        writer.write(request)  # who has asked once keeps the connection
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        running.should_exit = True
        await task

    asyncio.run(talk())


def test_addresses():
    with server.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert server.address(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}"):
            server.listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"cannot listen on 203\.0\.113\.7"):  # an address that is nobody's
        server.listen("203.0.113.7", 0)
    assert all(map(is_local, ("localhost", "127.0.0.2", "::1")))
    assert not any(map(is_local, ("0.0.0.0", "192.168.1.5")))
