"""Reading and writing speed on a CPU: Weft against llama.cpp and transformers, on the same model, in turns.

    python benchmarks/decode.py                     SmolLM2-135M (weft pull smollm2-135m); about ten minutes on two cores
    python benchmarks/decode.py --rounds 2 --quick  whether it runs

A round is, for each in random order: a prompt of 512 tokens and 128 more (one row), and 16 rows that each read 256 and write 64. llama.cpp
takes part where `llama_cpp` (llama-cpp-python) can be imported, through its low-level interface, transformers where it is installed, on the
same weights in bfloat16. Before anything is timed their greedy texts are compared with Weft's. The last line is one JSON object.
"""

import argparse
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from race import Racer, compare, machine, publish, tell

PROMPT, NEW = 512, 128
ROWS, ROW_PROMPT, ROW_NEW = 16, 256, 64
Answer = Callable[..., Any]


def prompts(seed: int, rows: int, length: int) -> list[list[int]]:
    """Prose that differs from row to row and from round to round: the documentation of Python that comes with it."""
    import pydoc_data.topics as pages

    from weft.tokenizer import load_tokenizer
    from weft.weights.hub import find_model

    ids = load_tokenizer(find_model("smollm2-135m")).encode("\n".join(text for _, text in sorted(pages.topics.items())))
    return [ids[start : start + length] for start in random.Random(seed).sample(range(len(ids) - length), rows)]


# What a contestant answers: seconds to the first token, seconds for the later ones (of all rows), and the ids of every row.


def weft(model: str, fast: bool) -> Answer:
    import torch

    from weft.engine import Request, SamplingParams
    from weft.engine.open import open_engine

    torch.set_num_threads(threads())
    engine = open_engine(model, fast=fast)

    def answer(rows: list[list[int]], new: int) -> tuple[float, float, list[list[int]]]:
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        order = {engine.submit(Request(ids, params)): row for row, ids in enumerate(rows)}
        texts: list[list[int]] = [[] for _ in rows]
        start, read = time.perf_counter(), 0.0
        while engine.busy:
            for event in engine.step():
                texts[order[event.request]].append(event.token)
            if not read and all(texts):
                read = time.perf_counter()
                texts_read = sum(map(len, texts))
        return read - start, (time.perf_counter() - read) / (sum(map(len, texts)) - texts_read), texts

    return answer


def llama_cpp(path: str) -> Answer:
    import ctypes

    import llama_cpp as ll
    import numpy as np

    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
    settings = ll.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = ROWS * (ROW_PROMPT + ROW_NEW), 512, 512, ROWS
    settings.n_threads = settings.n_threads_batch = threads()
    if hasattr(settings, "kv_unified"):
        settings.kv_unified = True
    context = ll.llama_init_from_model(model, settings)
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(512, 0, 1)

    def feed(tokens: list[tuple[int, int, int, bool]]) -> None:  # (token, position, row, whether its logits are wanted)
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, position, 1, row, wanted
        if ll.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def likeliest(index: int) -> int:
        logits = ctypes.cast(ll.llama_get_logits_ith(context, index), ctypes.POINTER(ctypes.c_float * vocab)).contents
        return int(np.frombuffer(logits, dtype=np.float32).argmax())

    def answer(rows: list[list[int]], new: int) -> tuple[float, float, list[list[int]]]:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        texts: list[list[int]] = []
        start = time.perf_counter()
        for row, ids in enumerate(rows):
            feed([(token, i, row, i == len(ids) - 1) for i, token in enumerate(ids)])
            texts.append([likeliest(len(ids) - 1)])
        read = time.perf_counter()
        for step in range(new - 1):
            feed([(text[-1], len(rows[row]) + step, row, True) for row, text in enumerate(texts)])
            for row, text in enumerate(texts):
                text.append(likeliest(row))
        return read - start, (time.perf_counter() - read) / (len(rows) * (new - 1)), texts

    return answer


def transformers(folder: str) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def answer(rows: list[list[int]], new: int) -> tuple[float, float, list[list[int]]]:
        start = time.perf_counter()
        out = model(input_ids=torch.tensor(rows), use_cache=True, logits_to_keep=1)
        tokens = [out.logits[:, -1].argmax(-1)]
        read = time.perf_counter()
        for _ in range(new - 1):
            out = model(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[:, -1].argmax(-1))
        seconds = (time.perf_counter() - read) / (len(rows) * (new - 1))
        return read - start, seconds, torch.stack(tokens, 1).tolist()

    return answer


def threads() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own() -> list[Racer]:
    return [Racer("weft", weft, "smollm2-135m", False), Racer("weft --fast", weft, "smollm2-135m", True)]


def peers(scratch: Path) -> list[Racer]:
    """Those that are installed."""
    from weft.weights.hub import find_model

    racers = []
    if importlib.util.find_spec("llama_cpp"):
        racers.append(Racer("llama.cpp", llama_cpp, str(find_model("smollm2-135m"))))
    if importlib.util.find_spec("transformers"):
        from weft.weights.load import load_model
        from weft.weights.save import save_model

        save_model(load_model("smollm2-135m").model, scratch / "dequantised")
        racers.append(Racer("transformers bfloat16", transformers, str(scratch / "dequantised")))
    return racers


def agreement(texts: list[list[int]], others: list[list[int]]) -> float:
    """Tokens of greedy text until the first difference, on average over rows: different roundings part sooner or later."""
    lengths = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x)) for x, y in zip(texts, others, strict=True)]
    return sum(lengths) / len(lengths)


def measure(racers: list[Racer], rounds: int, new: int, row_new: int) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of every contestant: prompt, decode, and all rows together."""
    found: dict[str, dict[str, list[float]]] = {racer.name: {"prompt": [], "decode": [], "rows": []} for racer in racers}
    for number in range(-1, rounds):  # the first one only warms up
        single, many = prompts(2 * number, 1, PROMPT), prompts(2 * number + 1, ROWS, ROW_PROMPT)
        for racer in random.sample(racers, len(racers)):
            read, token, _ = racer.ask(single, new)
            _, row_token, _ = racer.ask(many, row_new)
            if number >= 0:
                found[racer.name]["prompt"].append(PROMPT / read)
                found[racer.name]["decode"].append(1 / token)
                found[racer.name]["rows"].append(1 / row_token)
        tell(f"round {number + 1} of {rounds}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a few tokens, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    new, row_new = (8, 4) if options.quick else (NEW, ROW_NEW)
    facts = machine("transformers", "llama-cpp-python")
    with tempfile.TemporaryDirectory() as temporary:
        racers = [*own(), *peers(Path(temporary))]
        probe = prompts(99, 4, 64)
        texts = {racer.name: [racer.ask([row], 32)[2][0] for row in probe] for racer in racers}
        same = {racer.name: agreement(texts["weft"], texts[racer.name]) for racer in racers}
        tell(f"tokens of greedy text alike, of 32: {same}")
        if min(same.values()) < 4:
            tell("The texts part at once: not the same model, so nothing is timed.")
            return 1
        found = measure(racers, options.rounds, new, row_new)
        for racer in racers:
            racer.leave()
    rows = compare(found, "weft")
    publish({"benchmark": "decode", "machine": facts, "rounds": options.rounds, "agreement": same, "contestants": rows}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
