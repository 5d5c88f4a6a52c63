"""nn.Linear, and the head of a language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from asymq.layers import registry
from asymq.layers.layer import WEIGHT, QuantLayer
from asymq.layers.loss import aligning, keep_unquantized
from asymq.layers.registry import quantizes
from asymq.quantizers import OFF, QuantSpec, apply, functions
from asymq.quantizers.quantizer import is_split

# Elements of any type that make up a whole number of 16 bytes.
ALIGNMENT = 8


@quantizes(nn.Linear)
class QuantLinear(QuantLayer, nn.Linear):
    """nn.Linear with a quantized weight, input and output; None: not quantized.

    x: [..., in_features]. Range shapes of the weight: [1], [out, 1] per channel, [out, in / size]
    per group. ``from_float`` makes a QuantConv1D of transformers' Conv1D.
    """

    float_class = nn.Linear
    made_of = "nn.Linear or Conv1D"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight: QuantSpec | None = WEIGHT,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
    ):
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._create(weight, output, input)

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weight: QuantSpec | None = WEIGHT,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
    ) -> QuantLayer:
        """Of an nn.Linear or a Conv1D: a new layer that shares its parameters."""
        found = registry.find(type(module))
        if found is not None and found.__name__ == "QuantConv1D" and issubclass(found, QuantLayer):
            return found.from_float(module, weight, output, input)
        return super().from_float(module, weight, output, input)

    @classmethod
    def left_alone(cls, module: nn.Module) -> bool:
        # Whoever owns such a layer reads its weight and does not call it.
        return isinstance(module, NonDynamicallyQuantizableLinear) or super().left_alone(module)

    def forward(self, input: Tensor) -> Tensor:
        return self.quantize_output(self.product(input))

    def product(self, x: Tensor) -> Tensor:
        """What the forward returns, before its quantizer."""
        return self._multiply(apply(self.input_quantizer, x))

    def forward_quantized(self, x: Tensor) -> Tensor:
        """The forward of an x that is quantized already."""
        return self.quantize_output(self._multiply(x))

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized_weight(), self.bias)


class QuantLogits(QuantLinear):
    """A QuantLinear that lets a loss know what its output was before its quantizer.

    Where it trains on CUDA, its product has columns of zeros behind the classes, so that each row
    starts aligned, and the logits are a view of the others: an odd vocabulary makes the three
    products several times as slow.
    """

    def _multiply(self, x: Tensor) -> Tensor:
        weight = self.quantized_weight()
        padding = -len(weight) % ALIGNMENT
        if not (padding and gains_by_alignment(x, weight) and self._takes_padding()):
            return F.linear(x, weight, self.bias)
        bias = None if self.bias is None else F.pad(self.bias, (0, padding))
        return F.linear(x, F.pad(weight, (0, 0, 0, padding)), bias)

    def _takes_padding(self) -> bool:
        """Whether its quantizer does the same to every element, wherever it is."""
        quantizer = self.output_quantizer
        if quantizer is None or quantizer.state == OFF:
            return functions.may_fuse()
        return quantizer.fusible and not quantizer.live and quantizer.spec.gradient_scale is None

    def quantize_output(self, y: Tensor) -> Tensor:
        logits = super().quantize_output(y)
        classes = len(self.weight)
        if logits.shape[-1] != classes:
            logits = logits[..., :classes]
        if self.output_quantizer is not None:
            keep_unquantized(logits, y, self.output_quantizer)
        return logits


def gains_by_alignment(x: Tensor, weight: Tensor) -> bool:
    """Whether products of x take longer where their rows are not aligned, and may have longer rows.
    A compiler aligns them by itself."""
    return (
        is_large_on_cuda(x, weight)
        and not is_split(weight)
        and (torch.is_grad_enabled() or aligning())
        and not torch.compiler.is_compiling()
    )


def is_large_on_cuda(x: Tensor, weight: Tensor) -> bool:
    """Below this size a product takes no time that counts."""
    return x.is_cuda and weight.numel() >= 2**20
