"""Contestants in processes of their own that take turns: what every comparison of speed here is built on.

Each has the allocator, the threads and the caches that its users get, and all wait while one works.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Racer:
    """A contestant's process. `build(*arguments)` runs there once and returns the function that answers each `ask`."""

    def __init__(self, name: str, build: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, arguments, other), daemon=True)
        self._process.start()
        other.close()
        ready = self._pipe.recv()
        if ready != "ready":
            raise RuntimeError(f"{name}: {ready}")

    def ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()

    def leave(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(build: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...], pipe: Connection) -> None:
    try:
        answer = build(*arguments)
    except Exception as error:  # told to the first process, which names the contestant
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send("ready")
    while (question := pipe.recv()) is not None:
        pipe.send(answer(*question))


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def machine(*packages: str) -> dict[str, Any]:
    """The processor, its threads and load, and the versions of what took part."""
    from importlib.metadata import PackageNotFoundError, version

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    facts: dict[str, Any] = {"cpu": model, "threads": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    for package in ("torch", *packages):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def compare(found: Mapping[str, Mapping[str, list[float]]], own: str) -> dict[str, Any]:
    """Speeds of every contestant, round by round, as medians and as how many times as fast `own` is; printed as a table too."""
    columns = list(found[own])
    tell(f"\n{'':24}" + "".join(f"{column:>27}" for column in columns))
    rows: dict[str, Any] = {}
    for name, speeds in found.items():
        rows[name] = {}
        for column, values in speeds.items():
            ratios = [ours / other for ours, other in zip(found[own][column], values, strict=True)]
            rows[name][column] = {"tokens_per_s": round(spread(values)["median"], 1), "weft_is": spread(ratios)}
        cells = (f"{row['tokens_per_s']:8.0f}/s  weft x{row['weft_is']['median']:5.2f}" for row in rows[name].values())
        tell(f"{name:24}" + "".join(f"{cell:>27}" for cell in cells))
    return rows


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Write the result where it was asked for, and print it as the last line."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def tell(text: str) -> None:
    """Say something that is no part of the result."""
    print(text, file=sys.stderr, flush=True)
