"""A tiny policy with a tokenizer, prompts, and what an online objective is handed."""

import json
from pathlib import Path
from typing import Any

import torch
import train_cases as cases

from weft.data.prompts import PromptBatch, PromptExample, prompt_seed
from weft.nn import Model, add_score
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.train.objective import POLICY
from weft.train.rollout import Rollouts, Sampling

VOCAB, CONTEXT = 258, 96
ENDS = tuple("abcdefghijklmnopqrstuvwxyz")  # texts that end an answer, so that about half of those of random weights do


def policy_of(seed: int = 1, dtype: torch.dtype = torch.float64, **changes: Any) -> Model:
    return cases.model_of(dtype, seed, **{"vocab": VOCAB, "context": CONTEXT, **changes})


def scorer_of(seed: int, dtype: torch.dtype = torch.float64) -> Model:
    return add_score(policy_of(seed, dtype), 1, seed)


def tokenizer_of(folder: Path) -> Tokenizer:
    return load_tokenizer(cases.save_tokenizer(folder / "tok"))


def prompts_of(tokenizer: Tokenizer, count: int = 5, step: int = 0) -> PromptBatch:
    """Prompts of different lengths; the longest is more than a page of decode state."""
    texts = [f"say {number}:" + " please" * (3 * number) for number in range(count)]
    examples = [PromptExample(tuple(tokenizer.encode(t)), t, f"p:{n + 1}", {"answer": str(n)}) for n, t in enumerate(texts)]
    return PromptBatch(tuple(examples), tuple(prompt_seed(0, step, row) for row in range(count)), step)


def rollouts_of(tokenizer: Tokenizer, models: dict[str, Model], max_tokens: int = 9, **changes: Any) -> Rollouts:
    sampling = Sampling(max_tokens, **{"stop": ENDS, **changes})
    return Rollouts(tokenizer, sampling, torch.device("cpu"), torch.float64, models={POLICY: policy_of(), **models})


def judge_of(folder: Path) -> dict[str, float]:
    """A user's own judge, whose rewards differ between almost any two answers."""
    (folder / "judge.py").write_text("def score(answer):\n    return sum(map(ord, answer.text)) % 7 + len(answer.text) / 10\n")
    return {f"{folder / 'judge.py'}:score": 1.0}


def write_run(folder: Path, **objective: Any) -> dict[str, Any]:
    """A recipe over prompts, with a judge of its own, that takes a second."""
    cases.save_tokenizer(folder / "tok")
    lines = [json.dumps({"prompt": f"say {number}:", "answer": str(number)}) for number in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    model = {key: value for key, value in cases.LLAMA.items() if key != "vocab"} | {"context": CONTEXT}
    return {
        "model": model,
        "data": {"sources": [str(folder / "prompts.jsonl")], "valid": 0.2},
        "tokenizer": str(folder / "tok"),
        "out": str(folder / "run"),
        "steps": 3,
        "objective": {"rewards": judge_of(folder), "max_tokens": 6, "unfinished": "keep", **objective},
        "batch": {"rows": 4, "length": 24},
        "optim": {"lr": 1e-2, "warmup": 1},
        "log": {"plot": False},
        "eval": {"every": 2},
    }
