"""The run card: what was trained on what, for how long, at what cost, to what end. JSON for programs, Markdown for people."""

import platform
from typing import Any

import torch

from weft import __version__
from weft.train.callbacks import clock
from weft.train.watched import Watched

Card = dict[str, Any]


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    return {"weft": __version__, "torch": torch.__version__, "python": platform.python_version()}


def markdown(card: Card) -> str:
    """The card as a page."""
    model, run, cost = card["model"], card["run"], card["cost"]
    told = f"{run['objective']}, {run['steps_done']:,} of {run['steps'] or '?'} steps"
    how = f"{run['optimizer']}, {run['dtype']} on {run['device']}, seed {run['seed']}"
    lines = [
        f"# Run card: {card['status']}",
        "",
        f"A model of {model['parameters']:,} parameters ({model['family']}), {told} ({how}).",
        "",
        "## Data",
        "",
        *_table(["source", "share", "epochs", "tokens", "documents", "text"], [_source(each) for each in card["data"]]),
        "",
        "## Result",
        "",
        *_table(["", "value"], _results(card)),
        "",
        "## Cost",
        "",
        *_table(
            ["", "value"],
            [
                ["time", clock(cost["seconds"])],
                ["tokens", f"{cost['tokens']:,}"],
                ["tokens a second", f"{cost['tokens_per_s']:,.0f}"],
                ["floating-point operations", f"{cost['flops']:.3g}"],
                ["share of the measured peak (MFU)", f"{cost['mfu']:.1%} of {cost['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s"],
                ["peak memory", size(cost["peak_memory_bytes"])],
            ],
        ),
        "",
        f"{', '.join(f'{name} {version}' for name, version in card['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


def _source(each: dict[str, Any]) -> list[str]:
    counts = [f"{each['tokens']:,}", f"{each['documents']:,}", size(each["text_bytes"])]
    return [each["source"], f"{each['proportion']:.1%}", f"{each['epochs']:.2f}", *counts]


def _results(card: Card) -> list[list[str]]:
    rows = []
    for name, value in card["training"].items():
        rows.append([f"training {name}, last steps", f"{value:.4f}"])
    for what, measured in (("held-out", card["valid"]), ("mean of checkpoints, held-out", card["average"])):
        rows += [[f"{what} {name.replace('_', ' ')}", f"{value:.4f}"] for name, value in measured.items()]
    if card["best"]:
        rows.append(["best held-out figure", f"{Watched(**card['watched'][0]).best(card['best']['loss'])} at step {card['best']['step']}"])
    return rows


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
