"""How fast a model reads and writes on this machine, and how near that comes to what the machine can do."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from weft.engine.engine import Engine
from weft.engine.request import Request, SamplingParams
from weft.errors import UserError
from weft.machine import matmul_peak, memory_bandwidth
from weft.nn import Model
from weft.nn.experts import Experts
from weft.nn.packed import PackedWeight

BATCHES = (1, 4, 16)
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """What was measured; times in seconds, rates in units a second, medians of three.

    prompt_tokens_per_s         of one row's prompt.
    decode_tokens_per_s         of one row; `_4` and `_16` of so many rows together.
    first_token_cold_s          from an empty cache to the first token of that prompt; `warm`: the same prompt again.
    bytes_per_token             that one row's token reads: weights and state in the middle of the text.
    bandwidth                   bytes a second that a plain copy reads on this machine; `bandwidth_share` of it is what decoding reaches.
    flops                       a second that a large product in the model's dtype reaches; `flops_share` of it is what the prompt reaches.
    """

    prompt_tokens: int
    new_tokens: int
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    decode_tokens_per_s_4: float
    decode_tokens_per_s_16: float
    first_token_cold_s: float
    first_token_warm_s: float
    bytes_per_token: int
    bandwidth: float
    bandwidth_share: float
    flops: float
    flops_share: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(open_engine: Callable[[int], Engine], prompt: int, new: int, progress: Callable[[str], None] = lambda _: None) -> Speed:
    """Measure an engine of so many rows, which `open_engine` makes. Raises UserError where prompt and text do not fit its context."""
    if prompt < 1 or new < 2:
        raise UserError(f"prompt is {prompt} and new {new} tokens; measure at least 1 and 2.")
    engine = open_engine(max(BATCHES))
    if prompt + new > engine.context:
        raise UserError(f"{prompt} + {new} tokens are more than the model's context of {engine.context}; measure fewer.")
    progress("the machine")
    bandwidth, flops = memory_bandwidth(engine.model.device), matmul_peak(engine.model.device, engine.model.dtype)
    _run(engine, 1, prompt, new, seed=0)
    cold, warm, decode = [], [], {}
    for rows in BATCHES:
        progress(f"{rows} row{'s' * (rows > 1)}")
        rates = []
        for repeat in range(REPEATS):
            first, rate = _run(engine, rows, prompt, new, seed=1 + 10 * rows + repeat)
            rates.append(rate)
            if rows == 1:
                cold.append(first)
                warm.append(_run(engine, 1, prompt, 2, seed=1 + 10 * rows + repeat)[0])
        decode[rows] = median(rates)
    spec, first = engine.model.spec, median(cold)
    read = bytes_read(engine.model) + engine.state_bytes(prompt + new // 2)
    work = spec.flops(prompt) - 2 * (prompt - 1) * spec.dim * spec.vocab  # the head reads the last token alone
    return Speed(
        prompt_tokens=prompt,
        new_tokens=new,
        prompt_tokens_per_s=prompt / first,
        decode_tokens_per_s=decode[1],
        decode_tokens_per_s_4=decode[4],
        decode_tokens_per_s_16=decode[16],
        first_token_cold_s=first,
        first_token_warm_s=median(warm),
        bytes_per_token=read,
        bandwidth=bandwidth,
        bandwidth_share=read * decode[1] / bandwidth,
        flops=flops,
        flops_share=work / first / flops,
    )


def _run(engine: Engine, rows: int, prompt: int, new: int, seed: int) -> tuple[float, float]:
    """Seconds until every row has its first token, and tokens a second of all rows after that."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(engine.model.spec.vocab, (rows, prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    written = {engine.submit(Request(row, params)): 0 for row in ids}
    start, begun, before = time.perf_counter(), 0.0, 0
    while engine.busy:
        for event in engine.step():
            written[event.request] += event.token is not None
        if not begun and all(written.values()):
            begun, before = time.perf_counter(), sum(written.values())
    return begun - start, (sum(written.values()) - before) / (time.perf_counter() - begun)


def bytes_read(model: Model) -> int:
    """Bytes of weights that one token reads: all of them, but of a table of tokens that is no head a row alone, and of experts those that
    it is sent to."""
    total = _bytes_of(model)
    for block in model.layers():
        for part in block.parts().values():
            if isinstance(part, Experts):
                total -= _bytes_of(part.units) * (part.spec.experts - part.spec.top_k) // part.spec.experts
    if model.spec.tie_embeddings:
        return total
    table = model.embed.weight
    return total - (table.num_bytes if isinstance(table, PackedWeight) else table.numel() * table.element_size())


def _bytes_of(module: nn.Module) -> int:
    packed = sum(each.num_bytes for each in module.modules() if isinstance(each, PackedWeight))
    return packed + sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
