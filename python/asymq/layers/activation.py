"""Activation functions, and what stands for them in torch's own encoder layer."""

from __future__ import annotations

from typing import Literal

from torch import nn

from asymq.layers.quantized import Quantized
from asymq.layers.registry import quantizes

_NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)


def is_activation(module: nn.Module) -> bool:
    """Whether it is an activation function of torch or transformers, element by element."""
    files = ("torch.nn.modules.activation", "transformers.activations")
    known = any(cls.__module__ in files for cls in type(module).__mro__)
    return known and not isinstance(module, _NOT_ELEMENTWISE)


def is_tanh_gelu(module: nn.Module) -> bool:
    """Whether it computes GELU's tanh approximation, and nothing else."""
    cls = module.float_class if isinstance(module, Quantized) else type(module)
    if cls is nn.GELU:
        return module.approximate == "tanh"
    return cls.__module__ == "transformers.activations" and cls.__name__ in (
        "NewGELUActivation",
        "GELUTanh",
    )


def gating_function(module: nn.Module) -> Literal["silu", "gelu_tanh"] | None:
    """What it is to `ops.quantized_glu`; None: something else, or it has a quantizer of its own."""
    cls = type(module)
    if issubclass(cls, Quantized):
        return None
    if is_tanh_gelu(module):
        return "gelu_tanh"
    named = cls.__module__ == "transformers.activations" and cls.__name__ == "SiLUActivation"
    return "silu" if cls is nn.SiLU or named else None


@quantizes(nn.TransformerEncoderLayer)
class QuantEncoderLayer(Quantized):
    """nn.TransformerEncoderLayer off its fast path: in evaluation torch runs such a layer in one
    kernel that reads the weights itself."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """0 keeps torch from it; the layer's own value stays where it is."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value
