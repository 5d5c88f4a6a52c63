"""Normalization layers: nn.LayerNorm, and RMSNorm as each library writes it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from asymq.layers import registry
from asymq.layers.layer import NORM_WEIGHT, QuantNorm
from asymq.layers.registry import quantizes
from asymq.quantizers import QuantSpec, apply


@quantizes(nn.LayerNorm)
class QuantLayerNorm(QuantNorm, nn.LayerNorm):
    """nn.LayerNorm with a quantized weight, input and output; None: not quantized.

    Range shapes of the weight: [1], [channels], [channels / size].
    """

    float_class = nn.LayerNorm
    made_of = "nn.LayerNorm"
    weight: nn.Parameter  # None with elementwise_affine=False, and so is its quantizer

    def __init__(
        self,
        *args,
        weight: QuantSpec | None = NORM_WEIGHT,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
        **kwargs,
    ):
        nn.LayerNorm.__init__(self, *args, **kwargs)
        self._create(weight, output, input)

    @classmethod
    def output_channels(cls, module: nn.Module) -> int:
        assert isinstance(module, nn.LayerNorm)
        return module.normalized_shape[-1]

    input_channels = output_channels

    def forward(self, input: Tensor) -> Tensor:
        x = apply(self.input_quantizer, input)
        y = F.layer_norm(x, self.normalized_shape, self.quantized_weight(), self.bias, self.eps)
        return self.quantize_output(y)


@quantizes("*RMSNorm", "T5LayerNorm")
class QuantRMSNorm(QuantNorm):
    """A normalization by the root mean square, with a quantized weight, input and output; None: not
    quantized.

    Its own forward runs, with the weight read through its quantizer. Some multiply with 1 + weight
    (Gemma's): it is the weight that is quantized. Range shapes as those of a LayerNorm.
    """

    made_of = "an RMSNorm with one weight"

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        return registry.find(type(module)) is cls and not cls.left_alone(module)

    @classmethod
    def left_alone(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        alone = weight is None or weight.dim() != 1 or len(list(module.parameters())) != 1
        return alone or super().left_alone(module)
