"""Tiny models, data and jobs that the training tests share."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from weft.data.batches import Batches
from weft.data.packing import PackedBatch
from weft.data.store import TokenStore
from weft.data.windows import cut
from weft.nn import Model, build
from weft.objectives.next_token import NextToken
from weft.spec import ModelSpec, model_spec
from weft.train.job import Compute, Job, Length
from weft.train.objective import POLICY
from weft.train.run_folder import RunFolder

VOCAB = 61
LLAMA: dict[str, Any] = {
    "vocab": VOCAB,
    "dim": 16,
    "context": 24,
    "norm": {"type": "rms"},
    "layers": [
        {
            "repeat": 2,
            "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope": {}},
            "channel": {"type": "gated", "hidden": 24},
        }
    ],
}


def spec_of(**changes: Any) -> ModelSpec:
    return model_spec({**LLAMA, **changes})


def model_of(dtype: torch.dtype = torch.float64, seed: int = 1, **changes: Any) -> Model:
    """A tiny model whose weights are large enough for gradients to be far from zero."""
    return build(spec_of(init_std=0.2, **changes), dtype=dtype, seed=seed)


def store_of(documents: int = 40, seed: int = 3, masked: bool = False) -> TokenStore:
    """Documents of 2 to 40 random ids; `masked` trains on about half of the tokens."""
    random = np.random.default_rng(seed)
    made = [random.integers(0, VOCAB, int(length)).tolist() for length in random.integers(2, 41, documents)]
    masks = [random.integers(0, 2, len(document)).astype(bool).tolist() for document in made] if masked else None
    return TokenStore.from_lists(made, masks=masks)


def batches_of(rows: int = 7, length: int = 24, mode: str = "pack", masked: bool = False, rank: int = 0, world: int = 1) -> Batches:
    train, valid = cut(store_of(masked=masked), length, mode), cut(store_of(8, seed=4), length, mode)
    return Batches(train, rows, valid=valid, seed=5, rank=rank, world=world)


def batch_of(rows: int = 7, masked: bool = True) -> PackedBatch:
    return batches_of(rows, masked=masked).batch(0)


def job_of(out: Path, steps: int = 6, **changes: Any) -> Job:
    """A job in float64 over seven packed rows, with its folder held."""
    made: dict[str, Any] = {
        "models": {POLICY: model_of()},
        "objective": NextToken(),
        "batches": batches_of(),
        "folder": RunFolder(out),
        "out": out,
        "length": Length(steps=steps),
        "compute": Compute(torch.device("cpu"), torch.float64),
        "essentials": {"steps": steps},
    }
    return Job(**(made | changes))


def gradients(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def save_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of 256 bytes and two special tokens, in Hugging Face's layout."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=258, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False)
    made.train_from_iterator([], trainer)
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder
