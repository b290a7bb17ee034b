"""Short names of models that can be pulled, and the Hugging Face repos they stand for."""

from weft.zoo import ENTRIES

# Names beside the zoo's own, and the few that stand for another repo than the one the zoo's sizes are taken from: a person who pulls
# SmolLM2 wants to talk to it.
REPOS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm2-135m-base": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m-base": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b-base": "HuggingFaceTB/SmolLM2-1.7B",
    "tinyllama-1.1b-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b-instruct": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5-32b-instruct": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-72b-instruct": "Qwen/Qwen2.5-72B-Instruct",
    "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma2-2b-instruct": "google/gemma-2-2b-it",
    "gemma2-9b-instruct": "google/gemma-2-9b-it",
}


def known_names() -> list[str]:
    """Every short name that stands for a repo."""
    return sorted({*REPOS, *(name for name, entry in ENTRIES.items() if entry.repo)})


def repo_of(name: str) -> str | None:
    """The repo id behind a short name, or None."""
    if name in REPOS:
        return REPOS[name]
    return ENTRIES[name].repo if name in ENTRIES else None
