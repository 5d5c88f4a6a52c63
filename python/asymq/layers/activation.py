"""Activation functions, and what stands for them in torch's own encoder layer."""

from __future__ import annotations

from torch import nn

from asymq.layers.quantized import Quantized
from asymq.layers.registry import quantizes


def is_tanh_gelu(module: nn.Module) -> bool:
    """Whether it computes GELU's tanh approximation, and nothing else."""
    cls = module.float_class if isinstance(module, Quantized) else type(module)
    if cls is nn.GELU:
        return module.approximate == "tanh"
    return cls.__module__ == "transformers.activations" and cls.__name__ in (
        "NewGELUActivation",
        "GELUTanh",
    )


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
