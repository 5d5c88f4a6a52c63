"""Convolutions: nn.Conv1d and nn.Conv2d."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from asymq.layers.layer import WEIGHT, QuantLayer
from asymq.layers.registry import quantizes
from asymq.quantizers import QuantSpec, apply


class _QuantConvolution(QuantLayer):
    """A convolution with a quantized weight, input and output; None: not quantized.

    x: [batch, in_channels, ...]. Its channels are not the last axis, so an activation's range
    cannot lie along them. Range shapes of the weight, [out, in / groups, ...]: [1], [out, 1, ...]
    per channel, [out, in / groups / size, ...] per group.
    """

    _conv_forward: Callable[..., Tensor]
    bias: Tensor | None
    multiplies = False  # no axis of its input is that of a matrix product
    reduction_axis = 1

    def __init__(
        self,
        *args,
        weight: QuantSpec | None = WEIGHT,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
        **kwargs,
    ):
        self.float_class.__init__(self, *args, **kwargs)
        self._create(weight, output, input)

    @classmethod
    def output_channels(cls, module: nn.Module) -> None:
        return None

    input_channels = output_channels

    @classmethod
    def left_alone(cls, module: nn.Module) -> bool:
        # A computed weight (weight_norm's, in front ends of speech models) is nobody's parameter.
        return "weight" not in module._parameters or super().left_alone(module)

    def forward(self, input: Tensor) -> Tensor:
        x = apply(self.input_quantizer, input)
        return self.quantize_output(self._conv_forward(x, self.quantized_weight(), self.bias))


@quantizes(nn.Conv1d)
class QuantConv1d(_QuantConvolution, nn.Conv1d):
    float_class = nn.Conv1d
    made_of = "nn.Conv1d"


@quantizes(nn.Conv2d)
class QuantConv2d(_QuantConvolution, nn.Conv2d):
    float_class = nn.Conv2d
    made_of = "nn.Conv2d"
