"""How each kind of training begins: what it reads, which models it holds, and what it minimises. One file a kind of objective."""

from weft.methods.classify import ClassifyMethod
from weft.methods.distill import DistillMethod
from weft.methods.dpo import DPOMethod
from weft.methods.method import Method, Place, Setup
from weft.methods.next_token import NextTokenMethod
from weft.methods.online import GRPOMethod, RejectionMethod
from weft.methods.ppo import PPOMethod
from weft.methods.reward import RewardMethod
from weft.methods.sft import SFTMethod
from weft.objectives.settings import GRPOSettings, ObjectiveSettings, PPOSettings, RejectionSettings

METHODS: dict[str, Method] = {
    "next_token": NextTokenMethod(),
    "sft": SFTMethod(),
    "classify": ClassifyMethod(),
    "reward": RewardMethod(),
    "dpo": DPOMethod(),
    "distill": DistillMethod(),
    "ppo": PPOMethod(PPOSettings),
    "grpo": GRPOMethod(GRPOSettings),
    "rejection": RejectionMethod(RejectionSettings),
}


def method_of(settings: ObjectiveSettings) -> Method:
    """The method of what a recipe says under `objective`."""
    return METHODS[settings.type]


__all__ = ["METHODS", "Method", "Place", "Setup", "method_of"]
