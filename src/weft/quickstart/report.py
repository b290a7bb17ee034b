"""The result as JSON, as a page, and as lines on a screen."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weft.quickstart.judge import ParseShare
from weft.quickstart.measuring import LABELS
from weft.quickstart.options import Options
from weft.quickstart.picture import Curve, Shares, draw
from weft.quickstart.workplace import MARK
from weft.train.callbacks import clock
from weft.train.card import size, versions

Facts = dict[str, Any]
STAGES = {"before": "pretrained", "after": "fine-tuned", "reinforced": "reinforced"}
REINFORCEMENT = ("kl", "reward", "reward_before", "answer_tokens", "steps", "prompts")
ROWS = (
    ("gzip -9", "gzip"),
    ("byte 5-gram, Kneser-Ney, trained on the same text", "byte_5gram"),
    ("xz -9", "xz"),
    ("xz -9, given the training text", "xz_given_training"),
)


@dataclass(frozen=True)
class Results:
    """What the steps gave, each a JSON-ready dict."""

    corpus: Facts
    tokens: Facts
    pretrained: Facts
    tuned: Facts
    reinforced: Facts
    measured: Facts
    judged: Facts

    def steps(self) -> dict[str, Facts]:
        """Those that were timed."""
        names = ("tokens", "pretrain", "fine_tune", "reinforce", "measure", "judge")
        facts = (self.tokens, self.pretrained, self.tuned, self.reinforced, self.measured, self.judged)
        return dict(zip(names, facts, strict=True))


def build_report(options: Options, device: torch.device, results: Results) -> Facts:
    """Everything that is worth knowing about a job, JSON-ready. Times are in seconds, of the sitting in which a step was finished."""
    card, tuned = results.pretrained["card"], results.tuned
    seconds = {name: facts["seconds"] for name, facts in results.steps().items()}
    tokens = {name: results.tokens[name] for name in ("vocab", "bytes_per_token", "train_tokens", "heldout_tokens")}
    spent = {
        "pretrain": card["cost"]["tokens"],
        "epochs": card["data"][0]["epochs"],
        "fine_tune": tuned["card"]["cost"]["tokens"] if tuned["card"] else 0,
    }
    return {
        "format": MARK,
        "bits_per_byte": results.measured["bits_per_byte"],
        "bits_per_byte_fine_tuned": results.measured.get("bits_per_byte_fine_tuned"),
        "bits_per_byte_reinforced": results.measured.get("bits_per_byte_reinforced"),
        "baselines": results.measured["baselines"],
        "parse_share": results.judged["parse_share"],
        "reinforcement": {name: value for name, value in results.reinforced.items() if name in REINFORCEMENT},
        "tokens": {**spent, **tokens},
        "seconds": {**seconds, "training": card["cost"]["seconds"], "total": round(sum(seconds.values()), 3)},
        "peak_memory_bytes": max(facts["peak_memory_bytes"] for facts in results.steps().values()),
        "tokens_per_s": card["cost"]["tokens_per_s"],
        "mfu": card["cost"]["mfu"],
        "flops": card["cost"]["flops"],
        "model": card["model"],
        "pairs": tuned["pairs"],
        "fine_tuning_skipped": tuned["skipped"],
        "reinforcement_skipped": results.reinforced["skipped"],
        "corpus": results.corpus,
        "corpus_folder": "" if options.corpus is None else str(options.corpus),
        "samples": results.judged["samples"],
        "minutes": options.minutes,
        "seed": options.seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "compiled": card["run"]["compiled"],
        "versions": versions(),
        "out": str(options.out),
        "picture": "",
    }


def draw_report(report: Facts, curve: dict[str, list[list[float]]]) -> bytes:
    """The picture of a report as a PNG; raises ImportError where matplotlib is not installed."""
    train, heldout = ([list(axis) for axis in zip(*curve[side], strict=True)] or [[], []] for side in ("train", "heldout"))
    shares = report["parse_share"]
    accepted = Shares(tuple(shares[stage]["accepted"] for stage in shares), shares["before"]["samples"]) if shares else None
    baselines = {label: report["baselines"][name] for name, label in LABELS.items()}
    return draw(title_of(report), Curve(*train, *heldout), report["bits_per_byte"], baselines, accepted)


def title_of(report: Facts) -> str:
    """What the picture shows, in one line."""
    name, parameters = report["corpus"]["name"], report["model"]["parameters"] / 1e6
    threads = report["threads"]
    where = f"{threads} CPU thread{'s' * (threads != 1)}" if report["device"] == "cpu" else report["device"]
    return f"{name[0].upper() + name[1:]}: {parameters:.1f} M parameters, {clock(report['seconds']['training'])} min of training on {where}"


def share_facts(share: ParseShare) -> dict[str, Any]:
    low, high = share.bounds
    return {
        "share": round(share.share, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "accepted": share.accepted,
        "finished": share.finished,
        "samples": share.samples,
        "acting": share.acting,
        "parameters_read": round(share.share_used, 4),
        "lines": round(share.mean_lines, 2),
    }


def stages_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The model's three stages side by side: heads, and rows of a label and a value a stage. No rows where there was nothing to judge."""
    shares = report["parse_share"]
    heads = [name for stage, name in STAGES.items() if stage in shares]
    if not shares:
        return [], []
    each = list(shares.values())
    bits = [report["bits_per_byte"], report["bits_per_byte_fine_tuned"], report["bits_per_byte_reinforced"]][: len(each)]
    rows = [
        ["sampled functions that parse", *(f"{s['share']:.0%} ({100 * s['low']:.0f} to {100 * s['high']:.0f}%)" for s in each)],
        ["of these, with a body that does something", *(f"{s['acting'] / max(1, s['accepted']):.0%}" for s in each)],
        ["of their parameters, read", *(f"{s['parameters_read']:.0%}" for s in each)],
        ["lines a body", *(f"{s['lines']:.1f}" for s in each)],
        ["bits a byte of held-out text", *(f"{value:.3f}" for value in bits)],
    ]
    if "reinforced" in shares:
        rows.append(["divergence from the fine-tuned model, nats a function", "", "0", f"{report['reinforcement']['kl']:.1f}"])
    return heads, rows


def bits_table(report: dict[str, Any]) -> list[tuple[str, float]]:
    """(who, bits a byte), the most expensive first."""
    rows = [(label, report["baselines"][key]) for label, key in ROWS]
    rows.append((f"this model, {report['model']['parameters']:,} parameters", report["bits_per_byte"]))
    return sorted(rows, key=lambda row: -row[1])


def next_commands(report: Facts) -> list[str]:
    """What to type next: use the model, take it elsewhere, train a better one."""
    out = Path(report["out"])
    python = report["corpus"]["kind"] == "python"
    own = f"--corpus {shlex.quote(report['corpus_folder'])} " if report["corpus_folder"] else ""
    model = shlex.quote(str(out / "model"))
    return [
        f"weft generate {model} -p {shlex.quote('def ' if python else 'The ')} --temp 0.7",
        f"weft export {model} --to gguf -o {shlex.quote(str(out / 'model.gguf'))}",
        f"weft quickstart {own}--minutes 10 --out {shlex.quote(f'{out}-10')}",
    ]


def markdown(report: dict[str, Any]) -> str:
    """The run card as a page; everything in it is in the JSON too."""
    corpus, tokens, time = report["corpus"], report["tokens"], report["seconds"]
    lines = [
        "# Quickstart: run card",
        "",
        f"A Llama of {report['model']['parameters']:,} parameters, trained on {corpus['name']} for {clock(time['training'])}.",
        "",
        "![The result](quickstart.png)" if report["picture"] else "",
        "",
        "## Held-out text, bits a byte",
        "",
        f"{corpus['heldout_bytes']:,} bytes in {corpus['heldout_files']} files that share no module with the training text.",
        "",
        *_table(["", "bits a byte"], [[label, f"{value:.4f}"] for label, value in bits_table(report)]),
        "",
        *_shares(report),
        "## Data and cost",
        "",
        *_table(
            ["", "value"],
            [
                ["corpus", f"{corpus['files']:,} files, {size(corpus['bytes'])}"],
                ["vocabulary", f"{tokens['vocab']:,} tokens, {tokens['bytes_per_token']:.2f} bytes each"],
                ["pretraining", f"{tokens['pretrain']:,} tokens, {tokens['epochs']:.2f} epochs"],
                ["fine-tuning", report["fine_tuning_skipped"] or f"{tokens['fine_tune']:,} tokens, {report['pairs']:,} pairs"],
                ["reinforcement", report["reinforcement_skipped"] or _tell_reinforcement(report["reinforcement"])],
                ["tokens a second", f"{report['tokens_per_s']:,.0f} (MFU {report['mfu']:.0%})"],
                ["whole job", clock(time["total"])],
                ["peak memory", size(report["peak_memory_bytes"])],
                ["seed, device, threads", f"{report['seed']}, {report['device']}, {report['threads']}"],
                ["versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())],
            ],
        ),
        "",
        "## Samples",
        "",
        *(line for sample in report["samples"] for line in ("```" + _language(corpus), sample.rstrip("\n"), "```", "")),
        "## Next",
        "",
        "```bash",
        *next_commands(report),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _language(corpus: dict[str, Any]) -> str:
    return "python" if corpus["kind"] == "python" else "text"


def _tell_reinforcement(facts: dict[str, Any]) -> str:
    return f"{facts['steps']} steps, reward {facts['reward_before']:.2f} to {facts['reward']:.2f}, {facts['prompts']:,} prompts"


def _shares(report: dict[str, Any]) -> list[str]:
    heads, rows = stages_table(report)
    if not rows:
        return []
    asked = report["parse_share"]["before"]["samples"]
    return [f"## {asked} held-out functions, judged by `ast.parse`", "", *_table(["", *heads], rows), ""]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
