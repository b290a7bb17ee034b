"""Tokens a second of LoRA training, Weft against PEFT with transformers: the same weights, adapter, batches and AdamW, a step each in turn.

    python benchmarks/tune.py --out benchmarks/results/tune-cpu.json      about twenty minutes on two cores
    python benchmarks/tune.py --rounds 3 --tiny                           whether it runs

The base has SmolLM2-135M's architecture and random weights; the adapter, of rank 16 on every linear map, is written by Weft and read by
both. As in `train.py` every contestant lives in a process of its own, and before anything is timed its loss and the norm of the adapter's
gradient are compared with PEFT's in float32: where they differ, nothing is reported and the exit code is 1. Memory is what a process holds
at most while it steps. The last line of output is one JSON object.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from race import machine, publish, tell
from steps import Step, forget_peak, parser, report, take_turns, tokens_of, transformers_step, weft_step

LR, RANK, VOCAB = 1e-4, 16, 49152
TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2}  # of the loss, absolute, in nats
NORM_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the gradient's norm, relative
QUANTISED = 0.5  # how far weights in 4 bits may move the loss


@dataclass(frozen=True)
class Shape:
    """A batch, and how many of SmolLM2-135M's layers there are. The first `prompt` share of each row is read and not trained on, as much as
    in 500 conversations of a role-play set under SmolLM2's template."""

    layers: int = 30
    rows: int = 2
    length: int = 512
    prompt: float = 0.37

    @property
    def first(self) -> int:
        """The first token whose successor is trained on."""
        return round(self.prompt * self.length)


@dataclass(frozen=True)
class Contestant:
    """One way to train an adapter.

    dtype      "float32", or "bfloat16": products by autocast. The frozen base is kept in the same numbers, except where `wide`.
    attention  transformers: its `attn_implementation`.
    quantised  Weft: the base in NF4 with double quantisation.
    heap       with the allocator setting of Weft's trainer.
    """

    library: str
    dtype: str
    compiled: bool = False
    attention: str = "sdpa"
    wide: bool = False
    quantised: bool = False
    heap: bool = False

    @property
    def name(self) -> str:
        words = [self.library, self.dtype, "compiled" if self.compiled else "eager"]
        if self.library == "peft":
            words.append(self.attention)
            words += ["float32 base"] * (self.wide and self.dtype != "float32") + ["Weft's allocator setting"] * self.heap
        return ", ".join([*words, *["nf4"] * self.quantised])

    @property
    def counts(self) -> bool:
        """Whether it is what a user of PEFT would run."""
        return self.library == "peft" and not self.heap

    @property
    def races(self) -> bool:
        """Those in float32 show that all compute the same."""
        return self.dtype != "float32"

    @property
    def tolerance(self) -> tuple[float, float]:
        """Of the loss and of the gradient's norm. Other weights are another task."""
        return (QUANTISED, math.inf) if self.quantised else (TOLERANCE[self.dtype], NORM_TOLERANCE[self.dtype])


def contestants(compiled: bool) -> list[Contestant]:
    """The reference first."""
    peers = [Contestant("peft", "float32"), Contestant("peft", "bfloat16"), Contestant("peft", "bfloat16", wide=True)]
    peers += [Contestant("peft", "bfloat16", attention="eager"), Contestant("peft", "bfloat16", heap=True)]
    own = [Contestant("weft", "float32", heap=True), Contestant("weft", "bfloat16", heap=True)]
    own.append(Contestant("weft", "bfloat16", quantised=True, heap=True))
    if compiled:
        peers.append(Contestant("peft", "bfloat16", compiled=True))
        own.append(Contestant("weft", "bfloat16", compiled=True, heap=True))
    return peers + own


# What runs in a contestant's own process.


def their_step(contestant: Contestant, shape: Shape, folder: str) -> Step:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    narrow = contestant.dtype == "bfloat16"
    dtype = torch.bfloat16 if narrow and not contestant.wide else torch.float32
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype, attn_implementation=contestant.attention)
    model = PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True)

    def batch_of(number: int) -> tuple[Any, Any]:
        tokens = tokens_of(VOCAB, shape.rows, shape.length, number)
        targets = tokens[:, 1:].clone()
        targets[:, : shape.first] = -100
        return tokens[:, :-1].contiguous(), targets

    return transformers_step(model, batch_of, LR, narrow, contestant.compiled)


def own_step(contestant: Contestant, shape: Shape, folder: str) -> Step:
    import torch

    from weft.data.packing import PackedBatch
    from weft.quant.load import load_quantised
    from weft.spec import Quant
    from weft.weights.adapter_files import put_adapter, read_adapter
    from weft.weights.load import load_weights, open_checkpoint

    checkpoint, dtype = open_checkpoint(f"{folder}/base"), getattr(torch, contestant.dtype)
    double = Quant(type="nf4", double=True)
    model = load_quantised(checkpoint, double, dtype=dtype) if contestant.quantised else load_weights(checkpoint, dtype=dtype)
    put_adapter(model, read_adapter(f"{folder}/adapter"), checkpoint.family)
    index = torch.arange(shape.length).repeat(shape.rows, 1)

    def batch_of(number: int) -> PackedBatch:
        tokens = tokens_of(VOCAB, shape.rows, shape.length, number)
        return PackedBatch(
            tokens=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            positions=index,
            segments=None,
            loss_mask=index >= shape.first,
            num_bytes=0,
        )

    return weft_step(model, batch_of, LR, contestant.dtype, contestant.compiled)


def step_of(contestant: Contestant, shape: Shape, folder: str) -> Step:
    step = (their_step if contestant.library == "peft" else own_step)(contestant, shape, folder)
    forget_peak()
    return step


def write_inputs(shape: Shape, folder: str, seed: int) -> None:
    """A base in bfloat16 and an adapter for everyone. The adapter's second factors are not zero, so that all of it has gradients."""
    import torch

    from weft.nn import build
    from weft.spec import model_spec
    from weft.spec.adapters import LoRA
    from weft.weights.adapter_files import adapt, write_adapter
    from weft.weights.load import load_model
    from weft.weights.save import save_model
    from weft.zoo import ENTRIES

    spec = ENTRIES["smollm2-135m"].spec.model_dump()
    spec["layers"] = [{**spec["layers"][0], "repeat": shape.layers}]
    made = build(model_spec({**spec, "init_std": 0.04}), seed=seed, dtype=torch.float32)
    save_model(made, f"{folder}/base", dtype=torch.bfloat16)
    loaded = load_model(f"{folder}/base")
    adapt(loaded.model, LoRA(rank=RANK, alpha=2 * RANK), loaded.checkpoint.family, f"{folder}/base", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    Path(folder, "adapter").mkdir()
    write_adapter(loaded.model, Path(folder, "adapter"))


# What runs in the first process.


def of_lora(rows: list[dict[str, Any]]) -> float:
    """QLoRA's peak memory as a share of LoRA's."""
    lora, qlora = (next(row for row in rows if row["name"] == f"weft, bfloat16, eager{form}") for form in ("", ", nf4"))
    memory: float = qlora["peak_bytes"] / max(1, lora["peak_bytes"])
    tell(f"QLoRA's peak memory is {memory:.2f} of LoRA's, {qlora['tokens_per_s'] / lora['tokens_per_s']:.2f} times as fast")
    return memory


def main() -> int:
    options = parser(__doc__, rounds=9, tiny="two layers and a batch of no interest").parse_args()
    shape = Shape(layers=2, rows=2, length=40) if options.tiny else Shape()
    facts = machine("transformers", "peft")
    entrants = contestants(not options.eager)
    racers = take_turns(entrants, entrants[1], write_inputs, step_of, shape, options.rounds, fall=0.005)
    if racers is None:
        return 1
    best, rows = report(racers, shape.rows * shape.length, "PEFT", aside="nf4", memory=True)
    best["qlora_memory"] = of_lora(rows)
    result = {"benchmark": "tune", "shape": asdict(shape), "rounds": options.rounds, "machine": facts, **best, "rows": rows}
    publish(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
