"""Modules with quantizers: the one way in and out, and a class for each type of layer."""

from asymq.layers import activation, registry
from asymq.layers.conv import QuantConv1d, QuantConv2d
from asymq.layers.embedding import QuantEmbedding
from asymq.layers.layer import QuantLayer
from asymq.layers.linear import QuantLinear, QuantLogits
from asymq.layers.norm import QuantLayerNorm, QuantRMSNorm
from asymq.layers.quantized import Quantized, QuantOutput, quantized_parameters

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLayer",
    "QuantLayerNorm",
    "QuantLinear",
    "QuantLogits",
    "QuantOutput",
    "QuantRMSNorm",
    "Quantized",
    "activation",
    "quantized_parameters",
    "registry",
]
