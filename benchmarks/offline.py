"""What tuning on records gives a real model: a classifier's accuracy with and without the auxiliary loss, and what preferences teach.

    python benchmarks/offline.py classify sst2-train.tsv sst2-dev.tsv     with SmolLM2-135M, tens of minutes each on two cores
    python benchmarks/offline.py reward pairs.jsonl
    python benchmarks/offline.py dpo pairs.jsonl --text wikitext2.txt
    python benchmarks/offline.py dpo pairs.jsonl --train 8 --held-out 4   whether it runs

The recipes are those of `recipes/`, from the model that `--model` names (a pulled one, a folder or a GGUF file); `--set key=value` changes
them. Pairs without an answer are left out, the last `--held-out` of the others are held out, and the first `--train` trained on once.
Accuracies come with Wilson's 95% interval; with `--text`, bits a byte of it are measured before and after. The last line is one JSON
object.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from race import machine, publish, tell

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
LENGTH = 512  # tokens of text read at a time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("classify", "reward", "dpo"))
    parser.add_argument("files", type=Path, nargs="+", help="records; for classify those to train on and those held out")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--train", type=int, default=700)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--runs", type=Path, default=Path("runs/offline"), help="folder of the runs, which go on where they stopped")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe")
    options = parser.parse_args()
    facts = machine()
    measure = classify if options.kind == "classify" else prefer
    publish({"benchmark": f"offline {options.kind}", "machine": facts, "model": options.model, **measure(options)}, options.out)
    return 0


def classify(options: argparse.Namespace) -> dict[str, Any]:
    """The table of L2 and L3."""
    from weft.data.read_records import read_records
    from weft.data.record_kinds import Labelled

    train, held_out = options.files
    found = {}
    for name, weight in (("L2", 0.0), ("L3", 0.5)):
        data = f"data={{sources: [{train}], held_out: {held_out}}}"
        card, metrics = run(options, "classify", options.runs / name, [data, f"objective.lm={weight}"])
        count = len(read_records([held_out], Labelled))
        found[name] = {**share(metrics["valid_accuracy"], count), "log_loss": metrics.get("valid_class", metrics["valid_loss"])}
        found[name] |= {"minutes": round(card["cost"]["seconds"] / 60, 1)}
        tell(f"{name}: {found[name]}")
    return found


def prefer(options: argparse.Namespace) -> dict[str, Any]:
    """One epoch of a reward model, or of DPO, over the pairs."""
    options.runs.mkdir(parents=True, exist_ok=True)
    train, held_out = divide(options.files[0], options.train, options.held_out, options.runs)
    rows = min(16, options.train)
    steps = max(1, options.train // rows)
    data = [f"data={{sources: [{train}], held_out: {held_out}}}", f"steps={steps}", f"batch.rows={rows}", f"batch.micro={min(4, rows)}"]
    card, metrics = run(options, options.kind, options.runs / options.kind, [*data, f"eval.every={steps}"])
    found = {**share(metrics["valid_accuracy"], options.held_out), "margin": metrics["valid_margin"], "loss": metrics["valid_loss"]}
    found |= {"minutes": round(card["cost"]["seconds"] / 60, 1), "peak_memory_gb": round(card["cost"]["peak_memory_bytes"] / 1e9, 2)}
    if options.text is not None:
        before, after = (bits(source, options.text) for source in (options.model, options.runs / options.kind / "last"))
        found |= {"bits_per_byte": {"before": round(before, 4), "after": round(after, 4), "change": round(after / before - 1, 4)}}
    tell(str(found))
    return found


def run(options: argparse.Namespace, kind: str, out: Path, changes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run card, and the last line of the metrics, which is of the held-out records."""
    from weft.train.assemble import run_recipe
    from weft.train.recipe import read_recipe

    made = read_recipe(RECIPES / f"{kind}.yaml", [f"model={options.model}", f"out={out}", *changes, *options.set])
    card = run_recipe(made)
    if card["status"] == "interrupted":
        raise SystemExit(130)
    return card, json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def divide(pairs: Path, train: int, held_out: int, folder: Path) -> tuple[Path, Path]:
    """Two files with the first and the last of the pairs that are whole."""
    from weft.data.read_records import read_records
    from weft.data.record_kinds import Preference

    rows = {int(record.origin.rsplit(":", 1)[1]) for record in read_records([pairs], Preference, [])}
    kept = [line for number, line in enumerate(pairs.read_text(encoding="utf-8").splitlines(), 1) if number in rows]
    parts = {"train": kept[: min(train, len(kept) - held_out)], "held-out": kept[-held_out:]}
    for name, lines in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tell(f"{name}: {len(lines)} pairs")
    return folder / "train.jsonl", folder / "held-out.jsonl"


def share(value: float, count: int) -> dict[str, Any]:
    """An accuracy with Wilson's interval (1927), at 95%."""
    z = 1.959964
    middle, width = value + z * z / (2 * count), z * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    low, high = ((middle + sign * width) / (1 + z * z / count) for sign in (-1, 1))
    return {"accuracy": round(value, 4), "of": count, "interval": [round(low, 4), round(high, 4)]}


def bits(source: str | Path, text: Path) -> float:
    """Bits a byte of a text under a model, windows side by side."""
    import numpy as np
    import torch

    from weft.quickstart.scoring import score_stream
    from weft.tokenizer import load_tokenizer
    from weft.weights.load import load_model

    loaded = load_model(source, dtype=torch.bfloat16)
    said = text.read_text(encoding="utf-8")
    ids = np.array(load_tokenizer(loaded.path).encode(said), dtype=np.int64)
    return score_stream(loaded.model, ids, len(said.encode()), LENGTH, LENGTH, torch.bfloat16).bits_per_byte


if __name__ == "__main__":
    raise SystemExit(main())
