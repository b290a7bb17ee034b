"""Multi-token prediction: modules beside the model that look further ahead than one token."""

from typing import Literal

from pydantic import PositiveInt

from weft.spec.base import Spec


class MTP(Spec):
    """Modules that share the model's embedding and head, each a block like the model's last layer and a norm.

    sequential   module k reads what module k - 1 made of a token together with the token k places on, projected from 2 dim to dim, and says
                 what follows that one: the causal chain stays whole (DeepSeek-V3, DeepSeek-AI 2024, section 2.2).
    independent  every module reads the model's own hidden state and nothing else (Gloeckle et al. 2024, section 2).
    depth        how many modules: tokens foretold beside the next one.
    """

    type: Literal["sequential", "independent"] = "sequential"
    depth: PositiveInt = 1

    def num_params(self, dim: int, norm: int) -> int:
        """Of all modules, without their blocks and final norms, where a norm has `norm` parameters."""
        return self.depth * (2 * norm + 2 * dim * dim) if self.type == "sequential" else 0

    def flops(self, dim: int, length: int) -> int:
        """Of all modules, without their blocks and the head."""
        return self.depth * 4 * length * dim * dim if self.type == "sequential" else 0
