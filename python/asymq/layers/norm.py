"""Normalization layers: nn.LayerNorm."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

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
