"""The optimiser of one model: AdamW, or Muon for its matrices and AdamW for the rest."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import UserError
from weft.nn import Model
from weft.train.matrices import Weight, trained_weights
from weft.train.muon import Muon
from weft.train.settings import OptimSettings

_SLOTS = ("exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """All trained weights of a model, updated together. State is named by weight, so that it is stored without any pickling.

    Raises UserError where nothing in the model is trained.
    """

    def __init__(self, model: Model, settings: OptimSettings) -> None:
        self.settings = settings
        self.weights = trained_weights(model)
        if not self.weights:
            raise UserError("every weight of the model is frozen, so there is nothing to train; unfreeze some.")
        by_muon = settings.name == "muon"
        self._plain = [weight for weight in self.weights if not (by_muon and weight.kind == "matrix")]
        matrices = [weight for weight in self.weights if by_muon and weight.kind == "matrix"]
        self.muon = Muon(matrices, settings.weight_decay, settings.momentum)
        self.adamw = _adamw(self._plain, settings) if self._plain else None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [weight.parameter for weight in self.weights]

    def step(self, factor: float) -> None:
        """One update from the gradients at `factor` times the peak learning rates; the gradients are let go."""
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = self.settings.lr * factor
            self.adamw.step()
        self.muon.step((self.settings.matrix_lr or self.settings.lr) * factor)
        for weight in self.weights:
            weight.parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """ "<weight>.<slot>" -> tensor; before the first step only Muon's zeros."""
        state = self.muon.state()
        if self.adamw is not None:
            for weight in self._plain:
                slots: Mapping[str, Any] = self.adamw.state.get(weight.parameter, {})
                state.update({f"{weight.name}.{slot}": slots[slot] for slot in _SLOTS if slot in slots})
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; raises KeyError naming what is missing."""
        self.muon.load(state)
        if self.adamw is None or not any(name.endswith(".step") for name in state):
            return  # saved before the first step
        fused = self.adamw.defaults["fused"]
        for weight in self._plain:
            slots = {slot: state[f"{weight.name}.{slot}"] for slot in _SLOTS}
            device = weight.parameter.device
            self.adamw.state[weight.parameter] = {
                slot: value.to(device if fused or slot != "step" else "cpu", copy=True) for slot, value in slots.items()
            }


def _adamw(weights: list[Weight], settings: OptimSettings) -> torch.optim.AdamW:
    """Decay for maps between channels alone: the embedding of a rare token must not shrink while it is away."""
    decayed = [weight.parameter for weight in weights if weight.kind in ("matrix", "head", "factor")]
    others = [weight.parameter for weight in weights if weight.kind not in ("matrix", "head", "factor")]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = weights[0].parameter.device.type in ("cpu", "cuda")
    return torch.optim.AdamW([group for group in groups if group["params"]], settings.lr, settings.betas, settings.eps, fused=fused)


def clip_gradients(optimizer: Optimizer) -> Tensor:
    """Shrink an optimiser's gradients to the norm its settings allow; returns the norm they had, a scalar on their device."""
    parameters = [parameter for parameter in optimizer.parameters if parameter.grad is not None]
    norm: Tensor = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if optimizer.settings.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, optimizer.settings.clip, norm)
    return norm
