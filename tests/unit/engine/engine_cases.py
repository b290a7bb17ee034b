"""Models, prompts and helpers for the tests of the engine: every mixer of the conformance suite, and prompts of awkward lengths."""

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "conformance"))

from cases import DIM, SPECS, VOCAB

from weft.engine import Engine, Request, Result, SamplingParams
from weft.nn import Model, build
from weft.spec import ModelSpec, model_spec

__all__ = ["DIM", "SPECS", "VOCAB"]

# One token; a chunk and a token; two whole chunks; odd ones; one that is longer than the last chunk of another.
LENGTHS = (5, 1, 15, 14, 3, 29, 2)
CHUNK = 7
MEMORY_DIM = 10


@lru_cache(maxsize=8)
def model_of(name: str, dtype: torch.dtype = torch.float64) -> Model:
    return build(SPECS[name], dtype=dtype, seed=0).eval()


@lru_cache(maxsize=4)
def llama(vocab: int = 97, dtype: torch.dtype = torch.float64, context: int = 128) -> Model:
    """A tiny Llama-shaped model, its weights large enough for texts that are not all alike."""
    return build(llama_spec(vocab, context), dtype=dtype, seed=1).eval()


def llama_spec(vocab: int = 97, context: int = 128) -> ModelSpec:
    layer = {"repeat": 2, "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}}, "channel": {"type": "gated", "hidden": 48}}
    return model_spec(
        {
            "vocab": vocab,
            "dim": 32,
            "context": context,
            "init_std": 0.3,
            "norm": {"type": "rms"},
            "layers": [layer],
            "tie_embeddings": False,
        }
    )


def random_ids(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts(vocab: int = VOCAB, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [random_ids(length, 100 + number, vocab) for number, length in enumerate(lengths)]


def memory_for(name: str, number: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """A memory for models with cross-attention, None for others."""
    if not any(leaf.kind == "static" for layer in SPECS[name].state() or [] for part in layer.values() for leaf in part.values()):
        return None
    return torch.randn(2 + number, MEMORY_DIM, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(dtype)


def mixed_params(number: int, top_logprobs: int = 0) -> SamplingParams:
    """Greedy and sampled requests in turn, with all filters, of different lengths, so that rows finish at different times."""
    if number % 2 == 0:
        return SamplingParams(max_tokens=9 + number, logprobs=True, top_logprobs=top_logprobs)
    filters = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    return SamplingParams(max_tokens=8 + number, seed=number, logprobs=True, **filters, **penalties)


def requests_for(name: str, dtype: torch.dtype = torch.float64, top_logprobs: int = 0) -> list[Request]:
    return [Request(prompt, mixed_params(number, top_logprobs), memory_for(name, number, dtype)) for number, prompt in enumerate(prompts())]


def together(model: Model, requests: Sequence[Request], rows: int = 3) -> list[Result]:
    """All requests through one engine with fewer rows than requests, so that rows are recycled."""
    return Engine(model, rows=rows, chunk=CHUNK).generate(requests)


def alone(model: Model, requests: Sequence[Request]) -> list[Result]:
    """Each request in an engine of its own."""
    return [result for request in requests for result in Engine(model, rows=3, chunk=CHUNK).generate([request])]


def same_ids(left: Sequence[Result], right: Sequence[Result]) -> bool:
    return [result.ids for result in left] == [result.ids for result in right]


def drift(left: Sequence[Result], right: Sequence[Result]) -> float:
    """The largest difference between two lists of results in any token's log-probability; infinite where a token differs."""
    if not same_ids(left, right):
        return float("inf")
    pairs = [(a, b) for ours, theirs in zip(left, right, strict=True) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)]
    return max(abs(a.logprob - b.logprob) for a, b in pairs)
