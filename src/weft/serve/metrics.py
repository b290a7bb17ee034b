"""Figures for Prometheus at /metrics."""

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from weft.engine import Result
    from weft.serve.worker import Worker

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
WINDOW_S = 10.0

# What the engine counts in its `stats`: (attribute, our name, help, kind).
ENGINE_STATS = (
    ("running", "weft_running", "Texts being generated.", GaugeMetricFamily),
    ("waiting", "weft_queue", "Texts waiting for a row.", GaugeMetricFamily),
    ("state_bytes_used", "weft_state_bytes", "Bytes of decode state in use.", GaugeMetricFamily),
    ("state_bytes_allocated", "weft_state_allocated_bytes", "Bytes held for decode state, the prefix cache included.", GaugeMetricFamily),
    ("prompt_tokens", "weft_computed_prompt_tokens", "Prompt tokens that were computed.", CounterMetricFamily),
    ("cached_prompt_tokens", "weft_cached_prompt_tokens", "Prompt tokens whose state the prefix cache had.", CounterMetricFamily),
    ("preemptions", "weft_preemptions", "Texts that had to give back their state and start again.", CounterMetricFamily),
    ("drafted_tokens", "weft_drafted_tokens", "Tokens that a drafter proposed.", CounterMetricFamily),
    ("accepted_tokens", "weft_accepted_tokens", "Proposed tokens that became part of a text.", CounterMetricFamily),
)


class Metrics:
    """All figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # half as many lines, and nothing reads them
        self.registry = CollectorRegistry()
        labels, registry = ["model"], self.registry
        self.requests = Counter("weft_http_requests", "HTTP requests by path and status.", ["path", "status"], registry=registry)
        self.latency = Histogram("weft_http_seconds", "Time to the end of an answer.", ["path"], buckets=REQUEST_S, registry=registry)
        self.prompt_tokens = Counter("weft_prompt_tokens", "Prompt tokens of finished texts.", labels, registry=registry)
        self.tokens = Counter("weft_generated_tokens", "Tokens generated.", labels, registry=registry)
        self.texts = Counter("weft_texts", "Finished texts, by how they ended.", ["model", "reason"], registry=registry)
        self.refused = Counter("weft_refused", "Requests refused because the queue was full.", labels, registry=registry)
        self.cancelled = Counter("weft_cancelled", "Requests whose client went away.", labels, registry=registry)
        self.failed = Counter("weft_failed", "Requests dropped by an error in the engine.", labels, registry=registry)
        name, text = "weft_time_to_first_token_seconds", "From a request's arrival in the queue to its first token."
        self.first_token = Histogram(name, text, labels, buckets=FIRST_TOKEN_S, registry=registry)
        self.workers: list[Worker] = []
        registry.register(EngineFigures(self.workers))
        self.rate = Gauge("weft_tokens_per_second", f"Tokens generated a second, over the last {WINDOW_S:g} s.", labels, registry=registry)

    def of(self, model: str) -> "ModelMetrics":
        return ModelMetrics(self, model)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The figures of one model that are counted as they happen."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self.refused, self.cancelled = metrics.refused.labels(model), metrics.cancelled.labels(model)
        self.failed = metrics.failed.labels(model)
        self.first_token = metrics.first_token.labels(model)
        self._tokens, self._prompt_tokens = metrics.tokens.labels(model), metrics.prompt_tokens.labels(model)
        self._recent: deque[tuple[float, int]] = deque()
        metrics.rate.labels(model).set_function(self._rate)

    def count_tokens(self, count: int, now: float) -> None:
        if count:
            self._tokens.inc(count)
            self._recent.append((now, count))
            while self._recent[0][0] < now - WINDOW_S:
                self._recent.popleft()

    def _rate(self) -> float:
        since = time.monotonic() - WINDOW_S
        return sum(count for at, count in list(self._recent) if at >= since) / WINDOW_S

    def finished(self, result: "Result") -> None:
        if result.index == 0:
            self._prompt_tokens.inc(result.prompt_tokens)
        self._metrics.texts.labels(self._model, result.finish_reason).inc()


class EngineFigures(Collector):
    """What engines know of themselves, read when it is asked for."""

    def __init__(self, workers: "list[Worker]") -> None:
        self._workers = workers

    def collect(self) -> Iterator[Any]:
        for attribute, name, text, kind in ENGINE_STATS:
            family = kind(name, text, labels=["model"])
            for worker in self._workers:
                family.add_metric([worker.name], float(getattr(worker.stats, attribute)))
            yield family

    def describe(self) -> Iterator[Any]:
        return iter(())
