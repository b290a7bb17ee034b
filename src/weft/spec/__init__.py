"""What a model is, as a strict, serialisable tree. Importing this package never imports torch."""

from weft.spec.base import Leaf, Spec, StateSpec, parse
from weft.spec.channels import MLP, Gated, RWKVChannelMix
from weft.spec.experts import Experts
from weft.spec.latent import LatentAttention
from weft.spec.mixers import GRU, LSTM, Attention, CrossAttention, EntmaxAttention, Mamba
from weft.spec.model import Block, Dropout, Group, ModelSpec, model_spec, read_model_spec
from weft.spec.mtp import MTP
from weft.spec.norms import LayerNorm, RMSNorm
from weft.spec.patterns import Band, Dilated, Fixed, Pattern, Streaming, Strided
from weft.spec.positions import Learned, LinearScaling, Llama3Scaling, NoPosition, Rope, Sinusoidal, YarnScaling
from weft.spec.quant import Quant

__all__ = [
    "GRU", "LSTM", "MLP", "MTP", "Attention", "Band", "Block", "CrossAttention", "Dilated", "Dropout", "EntmaxAttention", "Experts",
    "Fixed", "Gated", "Group", "LatentAttention", "LayerNorm", "Leaf", "Learned", "LinearScaling", "Llama3Scaling", "Mamba", "ModelSpec",
    "NoPosition", "Pattern", "Quant", "RMSNorm", "RWKVChannelMix", "Rope", "Sinusoidal", "Spec", "StateSpec", "Streaming", "Strided",
    "YarnScaling", "model_spec", "parse", "read_model_spec",
]  # fmt: skip
