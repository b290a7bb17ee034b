"""The trained score head of a policy."""

from collections.abc import Sequence

import torch

from weft.nn import Model, add_score


def train_score(policy: Model, outputs: int, seed: int, labels: Sequence[str] = ()) -> Model:
    """Give a policy a score head of so many outputs, or keep the one it has where it is such a head, and train it: in full precision, also
    where the rest is frozen in less."""
    if policy.spec.score != outputs or policy.spec.labels != tuple(labels):
        add_score(policy, outputs, seed, labels)
    assert policy.score is not None
    policy.score.to(torch.promote_types(policy.dtype, torch.float32)).requires_grad_(True)
    return policy
