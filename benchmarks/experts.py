"""What routing costs: a training pass of a mixture of experts beside a dense gated channel of the same active parameters.

    python benchmarks/experts.py              about three minutes on two cores
    python benchmarks/experts.py --rounds 1   whether it runs

One layer of width 256 over 8 rows of 512 tokens, forward and backward in bfloat16 autocast: 16 experts of 128 channels, of which a token
meets two and a shared one, against one gated channel of 384. The peer is transformers' layer of Qwen3-MoE with three of 16 experts, as it
has none that are shared. Every contestant has a process of its own, and all take turns. The last line is one JSON object.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from race import Racer, machine, publish, spread, tell

DIM, HIDDEN, EXPERTS, ROWS, LENGTH = 256, 128, 16, 8, 512
DENSE = "dense, compiled"
KINDS = {
    "dense": ("dense", False),
    DENSE: ("dense", True),
    "experts": ("experts", False),
    "experts, compiled": ("experts", True),
    "transformers": ("transformers", False),
}


def contestant(kind: str, compiled: bool) -> Callable[[], float]:
    """Answers with the seconds of one pass."""
    import torch

    torch.manual_seed(0)
    forward, parameters = layer_of(kind)
    x, outer = torch.randn(ROWS, LENGTH, DIM, requires_grad=True), torch.randn(ROWS, LENGTH, DIM)

    def loss(x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        return (y.float() * outer).sum()

    run = torch.compile(loss, dynamic=False) if compiled else loss

    def measure() -> float:
        start = time.perf_counter()
        run(x).backward()
        seconds = time.perf_counter() - start
        for parameter in parameters:
            parameter.grad = None
        return seconds

    return measure


def layer_of(kind: str) -> tuple[Callable[[Any], Any], list[Any]]:
    import torch

    if kind == "transformers":
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": HIDDEN, "norm_topk_prob": True}
        theirs = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(hidden_size=DIM, experts_implementation="grouped_mm", **sizes))
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return theirs, list(theirs.parameters())
    from weft.nn import Step, build
    from weft.spec import model_spec

    experts = {"type": "experts", "experts": EXPERTS, "top_k": 2, "hidden": HIDDEN, "shared": 1, "score": "sigmoid", "choice_bias": True}
    channel = experts if kind == "experts" else {"type": "gated", "hidden": 3 * HIDDEN}
    ours = build(model_spec({"vocab": 8, "dim": DIM, "layers": [{"channel": channel}]}), seed=0).train().blocks[0].channel
    step = Step.parallel(torch.zeros(ROWS, LENGTH, dtype=torch.long))
    return lambda x: ours(x, step)[0], list(ours.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    facts = machine("transformers")
    racers = {name: Racer(name, contestant, *kind) for name, kind in KINDS.items()}
    found: dict[str, list[float]] = {name: [] for name in racers}
    for number in range(-2, options.rounds):  # the first two only warm up
        for name in random.sample(list(racers), len(racers)):
            seconds = min(racers[name].ask() for _ in range(3))
            if number >= 0:
                found[name].append(seconds)
    for racer in racers.values():
        racer.leave()
    rows: dict[str, Any] = {}
    for name, times in found.items():
        of_dense = spread([mine / theirs for mine, theirs in zip(times, found[DENSE], strict=True)])
        rows[name] = {"ms": round(1e3 * spread(times)["median"], 2), "of_dense": of_dense}
        tell(f"{name:20} {rows[name]['ms']:8.1f} ms  {of_dense['median']:.2f} of {DENSE}")
    same = spread([mine / theirs for mine, theirs in zip(found["experts"], found["dense"], strict=True)])
    publish({"benchmark": "experts", "machine": facts, "rounds": options.rounds, "eager_of_eager": same, "kinds": rows}, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
