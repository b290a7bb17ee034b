"""What computing with packed weights adds to the rounding of the weights themselves."""

import math

import torch

from weft.verify.check import Outcome
from weft.verify.passes import feed
from weft.verify.subject import Subject

LIMIT = 2e-3  # nats a token


@torch.inference_mode()
def quantised_drift(subject: Subject) -> Outcome:
    """Of a quantised model: KL divergence from the same codes dequantised, in float32 throughout, in the passes that generate."""
    exact = subject.in_float32()
    if exact is None:
        return Outcome.skipped(f"a float32 copy takes {subject.float32_bytes / 1e9:.1f} GB of memory, more than is free")
    total, places, bits = 0.0, 0, 0.0
    for prompt in subject.longest(4):
        tokens = torch.tensor([prompt.ids], device=subject.device)
        want = exact(tokens).logits[0].log_softmax(-1)
        got = subject.model.logits(feed(subject.model, prompt.ids, [len(prompt.ids)])).float().log_softmax(-1)
        total += float((want.exp() * (want - got)).sum())
        places += len(prompt.ids)
        bits += float((want - got)[:-1].gather(1, tokens[0, 1:, None]).sum()) / math.log(2)
    kind = subject.model.spec.quant.type if subject.model.spec.quant is not None else ""
    detail = f"{kind}: {places} tokens against the same weights dequantised; {bits / places:+.2g} bits a token"
    return Outcome.measured(total / places, LIMIT, "nats a token of KL divergence", detail)
