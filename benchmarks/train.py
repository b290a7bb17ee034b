"""Tokens a second of training, Weft against transformers: the same weights, the same batches, the same AdamW, one step each in turn.

    python benchmarks/train.py                      about ten minutes on two cores, most of it compiling
    python benchmarks/train.py --rounds 3 --tiny    whether it runs

Every contestant lives in a process of its own, so that each has the allocator, the threads and the caches that its users get; they
all wait while one steps. Before anything is timed, the loss and the gradient's norm of each are compared with transformers in
float32: where they differ, nothing is reported and the exit code is 1. The last line of output is one JSON object.
"""

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

from race import machine, publish
from steps import Step, parser, report, take_turns, tokens_of, transformers_step, weft_step

LR = 1e-3
TOLERANCE = {"float32": 3e-5, "bfloat16": 1e-2}  # of the loss, absolute, in nats
NORM_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of the gradient's norm, relative


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch; the default has 5.4 million parameters."""

    vocab: int = 4096
    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 688
    rows: int = 8
    length: int = 512


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    dtype      of the products, by autocast; weights and optimiser are float32.
    attention  transformers: its `attn_implementation`. Weft: "whole", or "packed" for documents of 100 tokens that do not see each other.
    rounded    weights and optimiser in bfloat16 too: another training than the rest, shown and not counted.
    heap       with the allocator setting of Weft's trainer.
    """

    library: str
    dtype: str
    compiled: bool
    attention: str
    rounded: bool = False
    heap: bool = False

    @property
    def name(self) -> str:
        words = [self.library, self.dtype, "compiled" if self.compiled else "eager", self.attention]
        if self.rounded:
            words.append("bfloat16 weights")
        if self.heap and self.library != "weft":
            words.append("Weft's allocator setting")
        return ", ".join(words)

    @property
    def counts(self) -> bool:
        """Whether it is what a user of transformers would run to train the same model in the same way."""
        return self.library == "transformers" and not self.rounded and not self.heap

    @property
    def races(self) -> bool:
        return True

    @property
    def tolerance(self) -> tuple[float, float]:
        """Of the loss and of the gradient's norm. Packed rows are another task."""
        return (math.inf, math.inf) if self.attention == "packed" else (TOLERANCE[self.dtype], NORM_TOLERANCE[self.dtype])


def contestants(compiled: bool) -> list[Contestant]:
    """The reference first."""
    peers = [Contestant("transformers", "float32", False, "sdpa"), Contestant("transformers", "bfloat16", False, "sdpa")]
    own = [Contestant("weft", "float32", False, "whole", heap=True), Contestant("weft", "bfloat16", False, "whole", heap=True)]
    if compiled:
        for attention in ("sdpa", "eager"):
            peers.append(Contestant("transformers", "bfloat16", True, attention))
        peers.append(Contestant("transformers", "bfloat16", True, "eager", heap=True))
        peers.append(Contestant("transformers", "bfloat16", True, "eager", rounded=True, heap=True))
        own += [Contestant("weft", "bfloat16", True, attention, heap=True) for attention in ("whole", "packed")]
    return peers + own


# What runs in a contestant's own process.


def their_step(contestant: Contestant, shape: Shape, folder: str) -> Step:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if contestant.rounded else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=contestant.attention)
    narrow = contestant.dtype == "bfloat16" and not contestant.rounded

    def batch_of(number: int) -> tuple[Any, Any]:
        tokens = tokens_of(shape.vocab, shape.rows, shape.length, number)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return transformers_step(model, batch_of, LR, narrow, contestant.compiled)


def own_step(contestant: Contestant, shape: Shape, folder: str) -> Step:
    import torch

    from weft.data.packing import PackedBatch
    from weft.weights.load import load_model

    index = torch.arange(shape.length).repeat(shape.rows, 1)
    packed = contestant.attention == "packed"

    def batch_of(number: int) -> PackedBatch:
        tokens = tokens_of(shape.vocab, shape.rows, shape.length, number)
        return PackedBatch(
            tokens=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            positions=index % 100 if packed else index,
            segments=index // 100 if packed else None,
            loss_mask=torch.ones_like(index, dtype=torch.bool),
            num_bytes=0,
        )

    model = load_model(folder, dtype=torch.float32).model
    return weft_step(model, batch_of, LR, contestant.dtype, contestant.compiled)


def step_of(contestant: Contestant, shape: Shape, folder: str) -> Step:
    return (their_step if contestant.library == "transformers" else own_step)(contestant, shape, folder)


def write_model(shape: Shape, folder: str, seed: int) -> None:
    """Initial weights for everyone. They are larger than usual, so that a wrong model shows in its loss."""
    from weft.nn import build
    from weft.spec import model_spec
    from weft.weights.save import save_model

    mixer = {"type": "attention", "heads": shape.heads, "kv_heads": shape.kv_heads, "rope": {"base": 10000.0}}
    layers = [{"repeat": shape.layers, "mixer": mixer, "channel": {"type": "gated", "hidden": shape.hidden}}]
    sizes = {"vocab": shape.vocab, "dim": shape.dim, "context": shape.length, "init_std": 0.1}
    spec = model_spec({**sizes, "tie_embeddings": True, "norm": {"type": "rms", "eps": 1e-5}, "layers": layers})
    save_model(build(spec, seed=seed), folder)


# What runs in the first process.


def main() -> int:
    options = parser(__doc__, rounds=15, tiny="a model and a batch of no interest").parse_args()
    shape = Shape(vocab=128, dim=32, layers=1, heads=2, kv_heads=1, hidden=64, rows=2, length=160) if options.tiny else Shape()
    facts = machine("transformers")
    entrants = contestants(not options.eager)
    racers = take_turns(entrants, entrants[1], write_model, step_of, shape, options.rounds, fall=0.05)
    if racers is None:
        return 1
    best, rows = report(racers, shape.rows * shape.length, "transformers", aside="packed")
    result = {"benchmark": "train", "shape": asdict(shape), "rounds": options.rounds, "machine": facts, **best, "rows": rows}
    publish(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
