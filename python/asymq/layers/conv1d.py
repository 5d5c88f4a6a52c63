"""transformers' Conv1D, a linear layer whose weight is [in, out]."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from asymq.layers.layer import WEIGHT, QuantLayer
from asymq.layers.registry import quantizes
from asymq.quantizers import QuantSpec, apply


@quantizes(Conv1D)
class QuantConv1D(QuantLayer, Conv1D):
    """Conv1D with a quantized weight, input and output; None: not quantized.

    x: [..., nx]. Range shapes of the weight: [1], [1, nf] per channel, [nx / size, nf] per group.
    """

    float_class = Conv1D
    made_of = "Conv1D"
    bias: Tensor
    channel_axis, reduction_axis = 1, 0

    def __init__(
        self,
        nf: int,
        nx: int,
        *,
        weight: QuantSpec | None = WEIGHT,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
    ):
        Conv1D.__init__(self, nf, nx)
        self._create(weight, output, input)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize_output(self.product(x))

    def product(self, x: Tensor) -> Tensor:
        """What the forward returns, before its quantizer."""
        x = apply(self.input_quantizer, x)
        return F.linear(x, self.quantized_weight().t(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.nx}, out_features={self.nf}, bias=True, Conv1D"

    __repr__ = nn.Module.__repr__  # Conv1D's leaves submodules out
