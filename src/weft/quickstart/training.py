"""Pretraining, fine-tuning, reinforcement: three recipes for the one trainer."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weft.quickstart.options import Options
from weft.quickstart.reporter import Reporter
from weft.quickstart.settings import Settings
from weft.train.assemble import run_recipe
from weft.train.callbacks import Callback, clock
from weft.train.history import Row, read_metrics
from weft.train.recipe import Recipe, recipe
from weft.train.speed import Pace

Card = dict[str, Any]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came while a model was trained; what had been done is saved."""


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: on a CPU it needs a C++ compiler and Python's headers. Found out by trying."""
    try:
        compiled = torch.compile(lambda x: torch.sin(x) + 1, dynamic=False)
        compiled(torch.zeros(8, device=device))
    except Exception:  # whatever is missing or broken, training goes on without a compiler
        return False
    return True


def pretraining_recipe(options: Options, settings: Settings, vocab: int, tokenizer: Path, shards: Path, out: Path) -> dict[str, Any]:
    """From initial weights, on rows that run on over file ends."""
    chosen = settings.pretraining
    optim = {
        "name": chosen.optim,
        "lr": chosen.lr,
        "weight_decay": chosen.weight_decay,
        "schedule": chosen.schedule,
        "final": chosen.final,
        "warmup": chosen.warmup if settings.steps is None else min(chosen.warmup, settings.steps),
    }
    if chosen.optim == "muon":
        optim["matrix_lr"] = chosen.matrix_lr
    return {
        "model": settings.model.spec(vocab),
        "data": {"sources": [{"path": str(shards), "name": "corpus"}], "packing": "stream"},
        "batch": {"rows": chosen.rows, "length": chosen.length},
        "optim": optim,
        **_common(options, settings, tokenizer, out),
        **_length(options.minutes, settings),
    }


def fine_tuning_recipe(options: Options, settings: Settings, base: Path, tokenizer: Path, shards: Path, out: Path) -> dict[str, Any]:
    """From pretrained weights, on pairs: loss on bodies and their end marks alone."""
    chosen = settings.fine_tuning
    optim = {"name": "muon", "lr": chosen.lr, "matrix_lr": chosen.matrix_lr, "weight_decay": 0.0, "schedule": "linear", "final": 0.0}
    return {
        "model": str(base),
        "data": {"sources": [{"path": str(shards), "name": "pairs"}], "packing": "best_fit"},
        "batch": {"rows": chosen.rows, "length": chosen.length},
        "optim": optim,
        **_common(options, settings, tokenizer, out),
        **_length(options.minutes * chosen.share, settings),
    }


def reinforcing_recipe(options: Options, settings: Settings, model: Path, tokenizer: Path, prompts: Path, out: Path) -> dict[str, Any]:
    """From fine-tuned weights, on the model's own bodies, which the parser judges. A body that does not end is worth nothing."""
    chosen = settings.reinforcing
    return {
        "model": str(model),
        "data": {"sources": [{"path": str(prompts), "name": "prompts"}], "valid": 0},
        "objective": {
            "type": "grpo",
            "rewards": {"python": {"parses": chosen.parses, "like": "completion"}},
            "samples": chosen.samples,
            "max_tokens": chosen.max_tokens,
            "beta": chosen.beta,
            "in_flight": chosen.rows * chosen.samples,
            "unfinished": "keep",
        },
        "batch": {"rows": chosen.rows, "length": chosen.length, "micro": min(16, chosen.rows * chosen.samples)},
        "optim": {"lr": chosen.lr, "weight_decay": 0.0, "schedule": "constant", "warmup": 2},
        **_common(options, settings, tokenizer, out),
        **_length(options.minutes * chosen.share, settings),
    }


def _common(options: Options, settings: Settings, tokenizer: Path, out: Path) -> dict[str, Any]:
    return {
        "tokenizer": str(tokenizer),
        "out": str(out),
        "seed": options.seed,
        "device": options.device,
        "dtype": options.dtype,
        "eval": {"batches": settings.eval_batches},
        "save": {"minutes": settings.save_minutes},
        "log": {"plot": False},
    }


def _length(minutes: float, settings: Settings) -> dict[str, Any]:
    return {"minutes": minutes} if settings.steps is None else {"steps": settings.steps}


def essentials(data: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe decides its result, for a step's key: neither where it is written nor how it is computed."""
    parsed: Recipe = recipe(data)
    kept = parsed.essentials()
    return {name: value for name, value in kept.items() if name not in ("model", "data", "tokenizer")} | {"model": data["model"]}


def train(data: dict[str, Any], compiled: bool, reporter: Reporter) -> Card:
    """Run a recipe, or what is left of it, and return its card; raises Interrupted after a Ctrl-C, when everything is saved."""
    card = run_recipe(recipe({**data, "compile": compiled}), callbacks=[_Watcher(reporter)])
    if card["status"] == "interrupted":
        raise Interrupted
    return card


class _Watcher(Callback):
    """Passes the pace on."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self._heldout = ""

    def on_start(self, card: Card) -> None:
        self.reporter.advance(0, None, "compiling the model" if card["run"]["compiled"] else "measuring the pace")

    def on_log(self, rows: Sequence[Row], pace: Pace) -> None:
        loss = sum(row["loss"] for row in rows) / max(1, len(rows))
        reward = f", reward {rows[-1]['reward']:.2f}" if "reward" in rows[-1] else ""
        note = f"loss {loss:.2f}{reward}, {pace.tokens_per_s:,.0f} tokens/s{self._heldout}"
        self.reporter.advance(pace.step, pace.total, note)

    def on_evaluate(self, row: Row) -> None:
        if "valid_bits_per_byte" in row:
            self._heldout = f", held out {row['valid_bits_per_byte']:.2f} bits/byte"


def read_curve(folder: Path, seconds: float) -> dict[str, list[list[float]]]:
    """Points (second, bits a byte) of a run that trained for `seconds`: of its batches, and of its looks at the held-out text."""
    rows = read_metrics(folder / "metrics.jsonl")
    last = max((row["step"] for row in rows), default=1) or 1
    points: dict[str, list[list[float]]] = {"train": [], "heldout": []}
    for row in rows:
        at = round(row["step"] / last * seconds, 3)
        if row.get("bits_per_byte") is not None:
            points["train"].append([at, round(row["bits_per_byte"], 4)])
        if row.get("valid_bits_per_byte") is not None:
            points["heldout"].append([at, round(row["valid_bits_per_byte"], 4)])
    return points


def tell_training(card: Card) -> str:
    """One line of result: tokens, epochs, time, speed."""
    cost, data = card["cost"], card["data"][0]
    return (
        f"{cost['tokens']:,} tokens ({data['epochs']:.2f} epochs) in {clock(cost['seconds'])}, {cost['tokens_per_s']:,.0f} tokens/s, "
        f"MFU {cost['mfu']:.0%}, loss {card['loss']:.2f}"
    )


def read_rewards(folder: Path) -> dict[str, float]:
    """What GRPO came to: mean rewards of the first and of the last ten steps, and of these the divergence from the fine-tuned model in nats
    an answer and an answer's tokens."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "reward" in row]
    last = rows[-10:]

    def mean(name: str, part: list[Row]) -> float:
        return round(sum(row[name] for row in part) / len(part), 4)

    ends = {"reward_before": mean("reward", rows[:10]), "reward": mean("reward", last)}
    return {**ends, "kl": mean("answer_kl", last), "answer_tokens": mean("length", last), "steps": len(rows)}


def drop_run(folder: Path) -> None:
    """Remove the run of a finished step: its weights have been saved elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)
