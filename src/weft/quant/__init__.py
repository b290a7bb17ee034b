"""Models in fewer bits: how weights are rounded, and how far the rounded model is from the original.

rounding   one matrix to codes, scales and minima: to nearest
gptq       the same, column by column, each error made good by the columns after it
model      a whole model, layer by layer
drift      what it cost: KL divergence and bits per byte
"""

from weft.quant.drift import Drift, Reference
from weft.quant.model import METHODS, Method, dequantize, quantize

__all__ = ["METHODS", "Drift", "Method", "Reference", "dequantize", "quantize"]
