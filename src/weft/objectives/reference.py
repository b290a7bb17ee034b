"""The model that a policy must stay near: what it was when training began, or another one."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from weft import kernels
from weft.nn import Model
from weft.nn.adapters import adapters_off, has_adapter
from weft.train.objective import POLICY, Role

REFERENCE = "reference"

ROLES: Mapping[str, Role] = {POLICY: Role(trained=True), REFERENCE: Role(trained=False)}


def reference_roles(names: Collection[str]) -> Mapping[str, Role]:
    """The roles of an objective that needs a reference, given those that have a model of their own."""
    return {name: role for name, role in ROLES.items() if name in names}


def reference_of(policy: Model, other: Model | None = None, fresh: bool = True) -> dict[str, Model]:
    """What is held beside a policy, by role: `other` where one is named; nothing where the policy has an adapter that is `fresh`, for
    without it the policy is the reference; else a copy of the policy. An adapter that was trained before belongs to what it began with.

    The copy keeps the policy's dtype: rounded to another one it would differ from the policy before the first step. Parameters that the
    policy does not train are the policy's own.
    """
    if other is not None:
        return {REFERENCE: other}
    if fresh and has_adapter(policy):
        return {}
    frozen: dict[int, Any] = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    return {REFERENCE: copy.deepcopy(policy, frozen).eval().requires_grad_(False)}


@contextmanager
def reference_in(models: Mapping[str, Model]) -> Iterator[Model]:
    """The reference of a run, without dropout and without gradients: a model of its own, or the policy with its adapter off. Native kernels
    compute it where they compute the policy, which is not in training."""
    plain = kernels.unused() if torch.is_grad_enabled() else nullcontext()
    if REFERENCE in models:
        with torch.no_grad(), plain:
            yield models[REFERENCE]
        return
    policy = models[POLICY]
    training = policy.training
    with torch.no_grad(), plain, adapters_off(policy):
        policy.eval()
        try:
            yield policy
        finally:
            policy.train(training)
