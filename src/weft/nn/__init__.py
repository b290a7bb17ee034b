"""How a model computes: one mixer interface, and one arena for everything a mixer remembers."""

# Importing a module registers its parts for `build`.
from weft.nn import attention, channel, cross_attention, entmax_attention, experts, latent_attention, mamba, recurrent, rwkv  # noqa: F401
from weft.nn.arena import Arena
from weft.nn.mixer import Mixer, Side, register, registered
from weft.nn.model import Model, Output, add_score, build, initialise, materialise
from weft.nn.runner import Runner
from weft.nn.step import Step

__all__ = [
    "Arena", "Mixer", "Model", "Output", "Runner", "Side", "Step", "add_score", "build", "initialise", "materialise", "register",
    "registered",
]  # fmt: skip
