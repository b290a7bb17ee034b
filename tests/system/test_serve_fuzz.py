"""Requests made up from the server's own description of itself, right ones and wrong ones: none is answered with a 5xx."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from serve_cases import make_model, serving

BODIES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
OTHERS = ["/v1/models", "/v1/models/{name}", "/health", "/metrics"]
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None, derandomize=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(make_model(tmp_path_factory.mktemp("models") / "small", context=48), "--queue", 2000) as server:
        yield server


@pytest.fixture(scope="module")
def description(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def ask(description, method, path, mode, count):
    """Send this many requests; returns the statuses."""
    statuses = []

    @settings(QUIET, max_examples=count)
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    def one(case):
        named(case)
        response = case.call()
        statuses.append(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])

    one()
    return statuses


def named(case):
    """Half of all bodies name the model that there is; the others would end at a 404."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 2 == 0:
        body["model"] = "small"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_no_body_breaks_the_server(description, path, mode):
    assert ask(description, "POST", path, mode, 10)


@pytest.mark.parametrize("path", OTHERS)
def test_no_question_breaks_the_server(description, path):
    assert ask(description, "GET", path, GenerationMode.POSITIVE, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_request_of_two_thousand_breaks_the_server(description):
    statuses = [status for path in BODIES for mode in MODES for status in ask(description, "POST", path, mode, 200)]
    assert len(statuses) >= 2000
    assert {200, 400, 404} <= set(statuses)
    print({status: statuses.count(status) for status in sorted(set(statuses))})


def test_the_server_is_still_well(server):
    with server.client() as client:
        assert server.chat(client, "a", max_tokens=1).status_code == 200
        figures = client.get("/metrics").text.splitlines()
        statuses = {line.split('status="')[1][:3] for line in figures if line.startswith("weft_http_requests_total")}
        assert "200" in statuses
        assert not any(status.startswith("5") for status in statuses)
        assert sorted(httpx.get(f"{server.url}/openapi.json").json()["paths"]) == sorted(BODIES + OTHERS)
