"""What a model's layers ask of whatever it is trained for: losses that keep experts busy, as terms, and statistics for `after_step`.

Any objective takes both from the output of its trained model: the terms join its own, the statistics travel among its metrics.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from weft.spec import Experts, ModelSpec
from weft.train.objective import Term

STATISTICS = ("chosen", "entropy", "tokens", "dropped", "zeros", "pairs")


class Auxiliary:
    """The losses of a model's layers as terms `balance` and `router_z`, each the mean over its layers and their tokens, weighted by the sum
    of the layers' weights.

    spec   of the trained model.   depth  how many of its modules for multi-token prediction run in training.
    A model in eval mode hands out none: held-out losses are of the objective alone.
    """

    def __init__(self, spec: ModelSpec | None = None, depth: int = 0) -> None:
        blocks = [] if spec is None else spec.blocks()
        further = [(f"mtp.{k}", block) for block in blocks[-1:] for k in range(1, depth + 1)]
        sites = [*((str(i), block) for i, block in enumerate(blocks)), *further]
        self.weights: dict[str, dict[str, float]] = {}
        for site, block in sites:
            for part, channel in block.parts().items():
                for name, weight in channel.auxiliary().items() if isinstance(channel, Experts) else ():
                    self.weights.setdefault(name, {})[f"{site}.{part}.{name}"] = weight

    def counts(self, tokens: int) -> dict[str, int]:
        """The count of every term, from the number of tokens that are not padding."""
        return dict.fromkeys(self.weights, tokens)

    def terms(self, aux: Mapping[str, Tensor], valid: Tensor) -> dict[str, Term]:
        """The terms of one pass, from `Output.aux` and valid [B, T]."""
        known = {key for keys in self.weights.values() for key in keys}
        strange = [key for key in aux if key.endswith((".balance", ".router_z")) and key not in known]
        assert not strange, f"the objective was made without the auxiliary losses of its model: {', '.join(strange)}"
        count, terms = valid.sum(), {}
        for name, keys in self.weights.items():
            total = sum(keys.values())
            if all(key in aux for key in keys):
                mean = torch.stack([aux[key] * (weight / total) for key, weight in keys.items()]).sum()
                terms[name] = Term(mean, count, total)
        return terms


def statistics(role: str, aux: Mapping[str, Tensor]) -> dict[str, Term]:
    """What the layers of a role's model counted in one pass, as the metrics that reach their `after_step`."""
    found = {f"{role}/{key}": value for key, value in aux.items() if key.rsplit(".", 1)[-1] in STATISTICS}
    return {name: Term(value.reshape(-1), 1.0) for name, value in found.items()}
