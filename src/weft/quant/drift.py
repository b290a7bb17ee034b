"""How far a quantised model's predictions are from the original's."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from weft.nn import Model

CHUNK = 128  # tokens whose distributions are held at a time beside the reference


@dataclass(frozen=True)
class Drift:
    """On the same text: mean KL divergence of the quantised model from the original in nats a token, the share of places where both
    find the same token likeliest, and bits per byte of each."""

    kl: float
    same_top: float
    bits_per_byte: float
    original_bits_per_byte: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        return (
            f"KL {self.kl:.2g} nats a token from the original, the same likeliest token at {self.same_top:.1%} of places; "
            f"{self.bits_per_byte:.4f} bits per byte (original {self.original_bits_per_byte:.4f})"
        )


class Reference:
    """The original's predictions on a text of ids, remembered so that it need not stay in memory.

    num_bytes  of the text that the ids after the first stand for.
    """

    def __init__(self, model: Model, ids: Sequence[int], num_bytes: int) -> None:
        self.ids, self.num_bytes = torch.tensor([list(ids)], device=model.device), max(1, num_bytes)
        self.logprobs = _logprobs(model, self.ids)

    def drift(self, model: Model) -> Drift:
        """Measure another model of the same vocabulary."""
        own = _logprobs(model, self.ids)
        kl = agree = 0.0
        for start in range(0, len(own), CHUNK):
            a, b = self.logprobs[start : start + CHUNK].float(), own[start : start + CHUNK].float()
            kl += float((a.exp() * (a - b)).sum())
            agree += float((a.argmax(-1) == b.argmax(-1)).sum())
        bits, before = self._bits(own), self._bits(self.logprobs)
        return Drift(kl / len(own), agree / len(own), bits, before)

    def _bits(self, logprobs: Tensor) -> float:
        chosen = logprobs[:-1].float().gather(1, self.ids[0, 1:, None])
        return -float(chosen.sum()) / math.log(2) / self.num_bytes


@torch.inference_mode()
def _logprobs(model: Model, ids: Tensor) -> Tensor:
    """Log-probabilities [T, vocab] after every token."""
    return model.eval()(ids).logits[0].float().log_softmax(-1)
