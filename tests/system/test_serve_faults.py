"""What clients and machines do to a server: nonsense, vanishing, crowds, signals, a model folder that goes away."""

import asyncio
import contextlib
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from serve_cases import Server, endless, events, make_model, serving

from weft.cli.main import load

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--rows", 4, "--queue", 8, "--body-limit", 0.1) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def eventually(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_error(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return True


# Nonsense.

GOOD = {"model": "small", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
DEEP = "[" * 50_000
NONSENSE = {
    "empty": "",
    "cut off": '{"model": "small", "mess',
    "no object": "[1, 2]",
    "a text": '"small"',
    "null": "null",
    "deep": '{"model": ' + DEEP,
    "deep schema": json.dumps(GOOD)[:-1] + ', "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": '
    + '{"items": ' * 300 + "{}" + "}" * 300 + "}}}",
    "long number": json.dumps(GOOD)[:-1] + ', "seed": ' + "9" * 5000 + "}",
    "infinite": json.dumps(GOOD)[:-1] + ', "temperature": 1e999}',
    "not a number": json.dumps(GOOD)[:-1] + ', "top_p": NaN}',
    "lone surrogate": json.dumps(GOOD | {"messages": [{"role": "user", "content": "\ud800"}]}),
    "surrogate as model": json.dumps(GOOD | {"model": "\ud800"}),
    "no utf-8": b'{"model": "\xff\xfe"}',
    "model as number": json.dumps(GOOD | {"model": 7}),
    "messages as text": json.dumps(GOOD | {"messages": "hello"}),
    "message as text": json.dumps(GOOD | {"messages": ["hello"]}),
    "no content": json.dumps(GOOD | {"messages": [{"role": "user"}]}),
    "null content": json.dumps(GOOD | {"messages": [{"role": "user", "content": None}]}),
    "no tokens": json.dumps(GOOD | {"max_tokens": 0}),
    "a fraction": json.dumps(GOOD | {"max_tokens": 1.5}),
    "a flag as text": json.dumps(GOOD | {"stream": "yes"}),
    "no choices": json.dumps(GOOD | {"n": 0}),
    "too many choices": json.dumps(GOOD | {"n": 13}),
    "empty stop": json.dumps(GOOD | {"stop": ""}),
    "bias of a word": json.dumps(GOOD | {"logit_bias": {"the": 1}}),
    "two tools of a name": json.dumps(GOOD | {"tools": [{"type": "function", "function": {"name": "f"}}] * 2}),
    "a name with a quote": json.dumps(GOOD | {"tools": [{"type": "function", "function": {"name": 'f"'}}]}),
    "schema as text": json.dumps(GOOD | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": "x"}}}),
}  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE, ids=str)
def test_nonsense_is_answered_with_what_is_wrong(client, case):
    response = client.post("/v1/chat/completions", content=NONSENSE[case], headers=JSON)
    assert is_error(response, 404 if case == "surrogate as model" else 400)


def test_paths_methods_and_kinds_of_body(client):
    assert is_error(client.get("/v1/nothing"), 404)
    assert is_error(client.get("/v1/models/none"), 404)
    assert is_error(client.get("/page/../../server.py"), 404)
    assert is_error(client.get("/..%2f..%2fserver.py"), 404)
    assert is_error(client.get("/v1/chat/completions"), 405)
    assert is_error(client.delete("/v1/models"), 405)
    # As a page of another site could send it, without being asked by the browser first.
    assert is_error(client.post("/v1/chat/completions", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"}), 400)
    assert client.post("/v1/chat/completions", content=json.dumps(GOOD), headers=JSON).status_code == 200


def test_large_bodies_are_refused_before_they_are_read(client):
    large = json.dumps(GOOD | {"messages": [{"role": "user", "content": "a" * 200_000}]}).encode()
    assert is_error(client.post("/v1/chat/completions", content=large, headers=JSON), 413)
    pieces = (large[at : at + 1000] for at in range(0, len(large), 1000))
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # where it is closed while the client still writes
        assert is_error(client.post("/v1/chat/completions", content=pieces, headers=JSON), 413)
    assert client.get("/health").json()["status"] == "ok"


def test_names_and_origins_of_others(client, server):
    assert is_error(client.get("/v1/models", headers={"Host": "example.com"}), 403)
    assert client.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200
    answer = client.get("/v1/models", headers={"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in answer.headers


def test_every_page_file_is_confined_and_told_what_it_may_load(client):
    page = client.get("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"


def test_figures_are_there(client, server):
    server.chat(client, max_tokens=5)
    server.chat(client, max_tokens=5)
    text = client.get("/metrics").text
    for name in ("queue", "running", "tokens_per_second", "generated_tokens_total", "state_bytes", "cached_prompt_tokens_total"):
        assert f'weft_{name}{{model="small"}}' in text
    assert server.metric("weft_time_to_first_token_seconds_count") >= 2
    assert server.metric("weft_generated_tokens_total") >= 6


# Clients that vanish.


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_place(server, client, folder, stream):
    before = server.metric("weft_cancelled_total")
    if stream:
        with server.stream(client, **endless(folder), n=4) as response:
            lines = response.iter_lines()
            next(lines)
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=GOOD | endless(folder) | {"n": 4, "temperature": 1}, timeout=0.2)
    eventually(lambda: server.metric("weft_cancelled_total") == before + 1)
    assert 'status="5' not in client.get("/metrics").text
    eventually(lambda: server.metric("weft_running") + server.metric("weft_queue") == 0)
    assert server.chat(client).status_code == 200


def test_a_full_queue_is_said_and_passes(server, client, folder):
    with server.stream(client, **endless(folder), n=8) as response:
        lines = response.iter_lines()  # to let go of it would close the connection
        next(lines)
        with server.client() as other:
            refused = server.chat(other, n=8)
            assert is_error(refused, 429)
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert server.chat(other).status_code == 200  # there is still room for one
    eventually(lambda: server.chat(client, n=8).status_code == 200)


def test_a_busy_server_leaves_every_answer_as_it_is(server, client, folder):
    alone = [server.chat(client, f"Line {i}:", max_tokens=20).json()["choices"][0]["message"] for i in range(8)]
    together = [None] * 8

    def ask(i):
        with server.client() as own:
            together[i] = server.chat(own, f"Line {i}:", max_tokens=20).json()["choices"][0]["message"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert together == alone


# Signals, time, and the machine.


def test_a_server_that_is_told_to_stop_finishes_what_runs(folder):
    server = Server(folder, "--rows", 4)
    answers, refused = [], []
    long = endless(folder) | {"max_tokens": 500}

    def ask():
        with server.client() as client, server.stream(client, **long) as response:
            answers.append(events(response))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    with server.client() as client:
        alone = server.chat(client, **long).json()["choices"][0]
        [thread.start() for thread in threads]
        eventually(lambda: server.metric("weft_running") == 4)
        server.tell(signal.SIGTERM)
        eventually(lambda: client.get("/health").status_code == 503, 5)
        refused.append(server.chat(client))
    [thread.join() for thread in threads]
    code, said = server.stop()
    assert (code, said["event"], said["drained"]) == (0, "stopped", True)
    assert is_error(refused[0], 503)
    assert "retry-after" in refused[0].headers
    assert len(answers) == 6
    for answer in answers:
        assert answer[-1] == "[DONE]"
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in answer[:-1]) == alone["message"]["content"]
    assert "Traceback" not in "".join(server.errors)


def test_grace_has_an_end(folder):
    server = Server(folder, "--rows", 2, "--grace", 0.1)
    with server.client() as client, server.stream(client, **endless(folder), n=12) as response:
        lines = response.iter_lines()
        next(lines)
        server.tell(signal.SIGTERM)
        said = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert said[-1]["error"]["code"] == "shut_down"
    code, outcome = server.stop()
    assert (code, outcome["drained"]) == (0, False)


def test_an_answer_that_takes_too_long_is_ended(folder):
    with serving(folder, "--timeout", 0.3) as server, server.client() as client:
        late = server.chat(client, **endless(folder), n=16)
        assert is_error(late, 504)
        with server.stream(client, **endless(folder), n=16) as response:
            assert events(response)[-1]["error"]["code"] == "timeout"
        eventually(lambda: server.metric("weft_running") == 0)
        assert server.chat(client, max_tokens=1).status_code == 200


def test_a_model_folder_that_goes_away_harms_nobody(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with serving(copy, end=signal.SIGINT) as server, server.client() as client:
        before = server.chat(client).json()["choices"]
        shutil.rmtree(copy)
        assert server.chat(client).json()["choices"] == before
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["a", "b"]}}}
        assert server.chat(client, response_format=form).status_code == 200
        assert client.get("/health").json()["status"] == "ok"


def test_origins_that_are_allowed_may_ask(folder):
    with serving(folder, "--cors", "https://example.com", "--api-key", "sesame") as server, server.client() as client:
        asked = {
            "Origin": "https://example.com",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        path, origin = "/v1/chat/completions", "https://example.com"
        assert client.options(path, headers=asked | {"Origin": origin}).headers["access-control-allow-origin"] == origin
        assert client.options(path, headers=asked | {"Origin": "https://example.org"}).status_code == 400
        assert is_error(client.get("/v1/models", headers={"Authorization": "Bearer Sesame"}), 401)
        assert client.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
        assert is_error(client.get("/metrics"), 401)
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_what_cannot_be_served_is_refused_before_it_starts(folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            "cannot listen on 127.0.0.1": [folder, "--port", port],
            "no path and has not been pulled": ["none-such", "--port", 0],
            "two models would be served as 'small'": [folder, folder, "--port", 0],
            "API key is empty": [folder, "--port", 0, "--api-key", ""],
        }
        command = [sys.executable, "-m", "weft.cli.main", "serve"]
        started = [subprocess.Popen([*command, *map(str, case)], stderr=subprocess.PIPE, text=True) for case in cases.values()]
        for said, process in zip(cases, started, strict=True):
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 2
            assert said in errors
            assert errors.count("\n") == 1


def test_the_flags_are_what_scripts_rely_on():
    own = ["--host", "--port", "--api-key", "--cors", "--rows", "--queue", "--memory", "--timeout", "--body-limit", "--grace"]
    flags = {flag for parameter in load("serve").params for flag in parameter.opts if flag.startswith("-")}
    assert flags | {"--help"} == {*own, "--device", "--dtype", "--draft", "--fast", "--state", "--adapter", "--json", "--help"}


def test_a_thousand_connections_at_once(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with serving(folder, "--queue", 500) as server:
            statuses = asyncio.run(_crowd(server, 1000))
            assert set(statuses) == {200, 429}
            assert statuses.count(200) >= 500
            assert len(statuses) == 1000
            eventually(lambda: server.metric("weft_running") + server.metric("weft_queue") == 0)
            with server.client() as client:
                assert server.chat(client).status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _crowd(server, count):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(GOOD | {"max_tokens": 4}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    open_ones = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(count)))

    async def ask(reader, writer):
        writer.write(head.encode() + body)
        status = int((await reader.readline()).split()[1])
        writer.close()
        return status

    return await asyncio.gather(*(ask(*pair) for pair in open_ones))
