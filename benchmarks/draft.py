"""What drafting is worth: one model that writes without drafts, with n-grams, and with modules of its own, in turns.

    weft train recipes/mtp.yaml data=corpus.txt tokenizer=tok out=runs/mtp
    python benchmarks/draft.py runs/mtp/last held-out.txt                     about five minutes on two cores
    python benchmarks/draft.py runs/mtp/last held-out.txt --rounds 1 --quick  whether it runs

A round is, for each in random order, text after stretches of the held-out file, 256 tokens and 128 more: one row, four rows, and one row
sampled at temperature 0.8, as the greedy text of a small model repeats itself, which n-grams live on. `always` drafts in every pass; the
others as the engine decides. All greedy texts are compared: drafting may change none. The last line is one JSON object.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from race import Racer, machine, publish, spread, tell

PROMPT, NEW, ROWS = 256, 128, 4
CONTESTANTS = {
    "none": ("none", 0),
    "ngram": ("ngram", 0),
    "mtp:1": ("mtp:1", 0),
    "mtp": ("mtp", 0),
    "mtp:1 always": ("mtp:1", 1),
    "mtp always": ("mtp", 8),
}
Answer = Callable[..., tuple[float, list[list[int]], int, int]]


def contestant(model: str, draft: str, always: int) -> Answer:
    """Answers prompts with the seconds that writing took, the ids of every row, and how many tokens were drafted and stood."""
    from weft.engine import Engine, Request, SamplingParams
    from weft.engine.mtp_draft import MTPDrafter
    from weft.engine.open import open_engine, open_model
    from weft.engine.speculation import FixedLength, Speculation

    if always:
        opened = open_model(model, draft=draft)
        drafter = MTPDrafter(opened.model, opened.draft if isinstance(opened.draft, int) else None)
        engine = Engine(opened.model, opened.tokenizer, draft=Speculation(drafter, FixedLength(always)))
    else:
        engine = open_engine(model, draft=draft)

    def answer(rows: list[list[int]], new: int, temperature: float) -> tuple[float, list[list[int]], int, int]:
        params, before = SamplingParams(max_tokens=new, ignore_eos=True, temperature=temperature, seed=rows[0][0]), engine.stats
        order = {engine.submit(Request(ids, params)): row for row, ids in enumerate(rows)}
        texts: list[list[int]] = [[] for _ in rows]
        start = 0.0
        while engine.busy:
            for event in engine.step():
                texts[order[event.request]].append(event.token)
            if not start and all(texts):  # every prompt is read
                start, read = time.perf_counter(), sum(map(len, texts))
        seconds, after = (time.perf_counter() - start) / (sum(map(len, texts)) - read), engine.stats
        return seconds, texts, after.drafted_tokens - before.drafted_tokens, after.accepted_tokens - before.accepted_tokens

    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model with modules for multi-token prediction")
    parser.add_argument("text", type=Path, help="a file that it was not trained on")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a few tokens, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    from weft.tokenizer import load_tokenizer
    from weft.weights.hub import find_model

    ids = load_tokenizer(find_model(options.model)).encode(options.text.read_text(encoding="utf-8"))
    new, facts = 16 if options.quick else NEW, machine()
    racers = [Racer(name, contestant, options.model, *how) for name, how in CONTESTANTS.items()]
    sizes = {"one row": (1, 0.0), f"{ROWS} rows": (ROWS, 0.0), "one row, sampled": (1, 0.8)}
    found: dict[str, dict[str, list[Any]]] = {racer.name: {size: [] for size in sizes} for racer in racers}
    for number in range(-1, options.rounds):  # the first one only warms up
        for size, (rows, temperature) in sizes.items():
            places = random.Random(2 * number + rows).sample(range(len(ids) - PROMPT), rows)
            prompts = [ids[place : place + PROMPT] for place in places]
            answers = {racer.name: racer.ask(prompts, new, temperature) for racer in random.sample(racers, len(racers))}
            parted = [name for name, answer in answers.items() if answer[1] != answers["none"][1]]
            if parted and not temperature:
                tell(f"The greedy texts of {', '.join(parted)} are not the ones without drafts: nothing is published.")
                return 1
            if number >= 0:
                for name, answer in answers.items():
                    found[name][size].append(answer)
        tell(f"round {number + 1} of {options.rounds}")
    for racer in racers:
        racer.leave()
    rows_of: dict[str, Any] = {}
    for name, by_size in found.items():
        rows_of[name] = {}
        for size, answers in by_size.items():
            plain = found["none"][size]
            drafted, stood = sum(answer[2] for answer in answers), sum(answer[3] for answer in answers)
            rows_of[name][size] = {
                "tokens_per_s": round(spread([1 / answer[0] for answer in answers])["median"], 1),
                "times_as_fast": spread([other[0] / answer[0] for answer, other in zip(answers, plain, strict=True)]),
                "drafted": drafted,
                "stood": round(stood / drafted, 3) if drafted else None,
            }
            row = rows_of[name][size]
            tell(f"{name:14}{size:>17}  {row['tokens_per_s']:8.1f}/s  x{row['times_as_fast']['median']:5.2f}  stood {row['stood']}")
    publish({"benchmark": "draft", "machine": facts, "rounds": options.rounds, "texts": "alike", "contestants": rows_of}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
