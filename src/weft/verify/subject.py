"""The model under test, with what every check needs of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft import kernels
from weft.engine import Engine
from weft.engine.budget import available_memory
from weft.nn import Model
from weft.nn.linear import num_plain
from weft.quant import dequantize
from weft.tokenizer import Tokenizer
from weft.verify.prompts import Prompt
from weft.weights.load import Checkpoint, load_weights

# How far two ways to compute the same logits may be apart, relative to the largest logit: what is left of rounding after some dozen
# layers. A wrong mask, position or state is apart by a tenth and more.
LOGIT_LIMITS = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Packed weights are multiplied with activations of 16 bits: where those differ by a rounding, products differ by one part in 64,000.
PACKED_LIMIT = 1e-3
GAP = 1e-4


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model.

    prompts     what it is tried on.
    new_tokens  how many are generated after each.
    chunks      sizes of the pieces in which prompts are fed, to be compared with one pass.
    """

    checkpoint: Checkpoint
    model: Model
    tokenizer: Tokenizer | None
    prompts: tuple[Prompt, ...]
    new_tokens: int
    chunks: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations and state are in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def near_tie(self) -> float:
        """Two tokens whose logits are closer than this may change places by rounding alone; 0 where nothing may.

        In float32 a matrix library sums in another order for another number of rows; on an accelerator it does so in every dtype.
        """
        if self.dtype == torch.float32:
            return 0.0 if self.exact_products else GAP
        if self.device.type == "cpu" or self.dtype == torch.float64:
            return 0.0
        return 16 * torch.finfo(self.dtype).eps

    @property
    def quantised(self) -> bool:
        return self.model.spec.quant is not None

    @property
    def exact_products(self) -> bool:
        """Whether every matrix is packed and multiplied by a kernel that adds up integers: rows then have nothing to do with each other."""
        plain = any(num_plain(module) for module in self.model.modules())
        quant = self.model.spec.quant
        return quant is not None and quant.type != "nf4" and not plain and self.device.type == "cpu" and kernels.available()

    def in_float32(self) -> Model | None:
        """The model in float32 with float32 weights, in which a mistake is not hidden by rounding: itself, or a copy; None where memory
        is too short."""
        if self.dtype == torch.float32 and not self.quantised:
            return self.model
        if self.device.type == "cpu" and self.float32_bytes > available_memory():
            return None
        return dequantize(self.model) if self.quantised else load_weights(self.checkpoint, self.device, torch.float32)

    @property
    def float32_bytes(self) -> float:
        """About what it takes to run a float32 copy."""
        return 4.8 * self.checkpoint.spec.num_params()

    def engine(self, rows: int) -> Engine:
        """An engine as the product's verbs make it."""
        return Engine(self.model, self.tokenizer, rows=rows)

    def spell(self, token: int | None) -> str:
        """A token for messages."""
        if token is None:
            return "the end"
        spelling = None if self.tokenizer is None else self.tokenizer.token(token)
        return str(token) if spelling is None else f"{token} {spelling!r}"

    def longest(self, most: int) -> Sequence[Prompt]:
        """Up to `most` prompts, the longest first."""
        return sorted(self.prompts, key=lambda prompt: -len(prompt.ids))[:most]


def limit_of(model: Model) -> float:
    """The largest difference of logits, relative to the largest logit, that rounding in the dtypes of model and state explains."""
    return max(LOGIT_LIMITS[model.dtype], LOGIT_LIMITS[model.state_dtype], PACKED_LIMIT if model.spec.quant is not None else 0.0)
