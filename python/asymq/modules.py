"""Layers whose weight and output are quantized, with the parameter names of the float layers.

`weight` and `output` are the specs of their quantizers, None where there is none. The
quantizers are the submodules `weight_quantizer` and `output_quantizer`, or None.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymq import ops
from asymq.quantizer import NormWeightQuantizer, QuantAct, Quantizer, WeightQuantizer, is_fusible
from asymq.specs import PerChannel, QuantSpec

# What a layer gets where nothing is said (the paper's section 4).
WEIGHT = QuantSpec(bits=4, symmetric=True, granularity=PerChannel())
NORM_WEIGHT = QuantSpec(bits=12)


def _adopt(target: nn.Module, source: nn.Module) -> None:
    """Gives target all that source has: the same parameters and submodules, hooks, attributes."""
    for key, value in vars(source).items():
        target.__dict__[key] = value.copy() if isinstance(value, dict) else value


class _Borrowed:
    """Hides a quantizer that another module registers from nn.Module: parameters and state_dict
    name it once."""

    def __init__(self, quantizer: Quantizer | None):
        self.quantizer = quantizer


class QuantLayer(nn.Module):
    """What the layers share: a weight, its quantizer, and a way back to the float layer."""

    _weight_quantizer_class = WeightQuantizer
    # Axes of the weight where a granularity names none.
    _channel_axis, _reduction_axis = 0, -1

    def _quantize(
        self,
        float_class: type,
        weight: QuantSpec | None,
        output: QuantSpec | None,
        name: str,
    ) -> None:
        self._check(name or type(self).__name__, weight)
        self._float_class = float_class
        self._borrowed: _Borrowed | None = None
        self._lent = False
        prefix = f"{name}." if name else ""
        self.weight_quantizer = self.output_quantizer = None
        if weight is not None:
            self.weight_quantizer = self._weight_quantizer_class(
                weight,
                tuple(self.weight.shape),
                channel_axis=self._channel_axis,
                reduction_axis=self._reduction_axis,
                name=f"{prefix}weight_quantizer",
                device=self.weight.device,
            )
        if output is not None:
            device = None if self.weight is None else self.weight.device
            self.output_quantizer = QuantAct.on_last_axis(
                output, self.output_channels, f"{prefix}output_quantizer", device
            )

    def _check(self, label: str, weight: QuantSpec | None) -> None:
        """ValueError if the layer's options do not go with quantizers."""
        if self.weight is None and weight is not None:
            raise ValueError(f"{label}: the layer has no weight to quantize: weight must be None")

    @classmethod
    def of_float(
        cls, module: nn.Module, weight: QuantSpec | None, output: QuantSpec | None, name: str = ""
    ):
        """`from_float` of any of the layers, with a name for its quantizers' errors."""
        if "forward" in vars(module):
            raise ValueError(
                f"{name or cls.__name__}: the forward of this {type(module).__name__} has been "
                "replaced (as accelerate's device maps do); quantize the layer before that"
            )
        layer = cls.__new__(cls)
        _adopt(layer, module)
        layer._quantize(type(module), weight, output, name)
        return layer

    def to_float(self) -> nn.Module:
        """The float layer that this one was made of, with this one's parameters."""
        module = self._float_class.__new__(self._float_class)
        _adopt(module, self)
        for key in ("weight_quantizer", "output_quantizer"):
            delattr(module, key)
        del module._float_class, module._borrowed, module._lent
        return module

    def borrow_weight_quantizer(self, owner: QuantLayer) -> None:
        """Uses the quantizer of the layer whose weight this one shares."""
        self.weight_quantizer = None
        self._borrowed = _Borrowed(owner.weight_quantizer)

    def lend_output_quantizer(self) -> QuantAct | None:
        """The quantizer of the output, which whoever asks applies from now on: this layer's output
        is what comes before it."""
        self._lent = True
        return self.output_quantizer

    def quantized_weight(self) -> Tensor | None:
        quantizer = self.weight_quantizer if self._borrowed is None else self._borrowed.quantizer
        return self.weight if quantizer is None else quantizer(self.weight)

    def _output(self, y: Tensor) -> Tensor:
        return y if self.output_quantizer is None or self._lent else self.output_quantizer(y)


class QuantLinear(QuantLayer):
    """nn.Linear, or with ``from_float`` transformers' Conv1D, which stores its weight as [in, out].

    x: [..., in_features]. Range shapes of the weight: [1], [out, 1] per channel (Conv1D: [1, out]),
    [out, in / size] per group (Conv1D: [in / size, out]).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        weight: QuantSpec | None = WEIGHT,
        output: QuantSpec | None = None,
    ):
        super().__init__()
        _adopt(self, nn.Linear(in_features, out_features, bias, device, dtype))
        self._quantize(nn.Linear, weight, output, "")

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weight: QuantSpec | None = WEIGHT,
        output: QuantSpec | None = None,
    ) -> QuantLinear:
        """Of an nn.Linear or a Conv1D, whose parameters it shares."""
        if not isinstance(module, nn.Linear) and not is_conv1d(type(module)):
            raise ValueError(
                f"QuantLinear.from_float: needs nn.Linear or Conv1D, got {type(module).__name__}"
            )
        return cls.of_float(module, weight, output)

    @property
    def transposed(self) -> bool:
        """Whether the weight is [in, out]."""
        return is_conv1d(self._float_class)

    @property
    def _channel_axis(self) -> int:
        return 1 if self.transposed else 0

    @property
    def _reduction_axis(self) -> int:
        return 0 if self.transposed else 1

    @property
    def output_channels(self) -> int:
        return self.weight.shape[self._channel_axis]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized_weight()
        return self._output(F.linear(x, weight.t() if self.transposed else weight, self.bias))

    def extra_repr(self) -> str:
        out, reduction = self._channel_axis, self._reduction_axis
        return (
            f"in_features={self.weight.shape[reduction]}, out_features={self.weight.shape[out]}, "
            f"bias={self.bias is not None}" + (", Conv1D" if self.transposed else "")
        )


class QuantEmbedding(QuantLayer, nn.Embedding):
    """nn.Embedding. What it returns is on its weight's grid: it has no output quantizer.

    Range shapes of the weight: [1], [num_embeddings, 1], [num_embeddings, embedding_dim / size].
    """

    output_channels = None

    def __init__(self, *args, weight: QuantSpec | None = WEIGHT, **kwargs):
        nn.Embedding.__init__(self, *args, **kwargs)
        self._quantize(nn.Embedding, weight, None, "")

    @classmethod
    def from_float(cls, module: nn.Embedding, weight: QuantSpec | None = WEIGHT) -> QuantEmbedding:
        """Of an nn.Embedding, whose weight it shares."""
        if not isinstance(module, nn.Embedding):
            raise ValueError(
                f"QuantEmbedding.from_float: needs nn.Embedding, got {type(module).__name__}"
            )
        return cls.of_float(module, weight, None)

    def _check(self, label: str, weight: QuantSpec | None) -> None:
        if self.max_norm is not None or self.sparse:
            raise ValueError(
                f"{label}: max_norm and sparse gradients change the weight or its gradient row by "
                "row; the ranges cannot follow"
            )

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(
            indices,
            self.quantized_weight(),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


class QuantLayerNorm(QuantLayer, nn.LayerNorm):
    """nn.LayerNorm. Range shapes of the weight: [1], [channels], [channels / size]."""

    _weight_quantizer_class = NormWeightQuantizer

    def __init__(
        self,
        *args,
        weight: QuantSpec | None = NORM_WEIGHT,
        output: QuantSpec | None = None,
        **kwargs,
    ):
        nn.LayerNorm.__init__(self, *args, **kwargs)
        self._quantize(nn.LayerNorm, weight, output, "")

    @classmethod
    def from_float(
        cls,
        module: nn.LayerNorm,
        weight: QuantSpec | None = NORM_WEIGHT,
        output: QuantSpec | None = None,
    ) -> QuantLayerNorm:
        """Of an nn.LayerNorm, whose parameters it shares; without a weight, weight must be None."""
        if not isinstance(module, nn.LayerNorm):
            raise ValueError(
                f"QuantLayerNorm.from_float: needs nn.LayerNorm, got {type(module).__name__}"
            )
        return cls.of_float(module, weight, output)

    @property
    def output_channels(self) -> int:
        return self.normalized_shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized_weight()
        return self._output(F.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps))


class QuantOutput(nn.Module):
    """Any module followed by the quantizer of its output, a tensor.

    original: the module of the float model for which `module` stands, by default itself.
    """

    def __init__(self, module: nn.Module, quantizer: QuantAct, original: nn.Module | None = None):
        super().__init__()
        self.module = module
        self.output_quantizer = quantizer
        # In a tuple nn.Module does not register it.
        self._original = (original or module,)

    def to_float(self) -> nn.Module:
        return self._original[0]

    def forward(self, *args, **kwargs) -> Tensor:
        return self.output_quantizer(self.module(*args, **kwargs))


class QuantGelu(QuantOutput):
    """nn.GELU(approximate="tanh") between the quantizer of its input, which the layer before lends,
    and that of its output."""

    def __init__(self, layer: QuantLayer, quantizer: QuantAct, original: nn.Module):
        super().__init__(nn.GELU(approximate="tanh"), quantizer, original)
        self._input = _Borrowed(layer.lend_output_quantizer())

    def forward(self, x: Tensor) -> Tensor:
        before, after = self._input.quantizer, self.output_quantizer
        if is_fusible(before) and is_fusible(after):
            return ops.quantized_gelu(x, before.range_arguments(), after.range_arguments())
        return super().forward(x if before is None else before(x))


class QuantLogits(QuantLinear):
    """A QuantLinear whose output leads to what it was before its quantizer, while a graph does too:
    `unquantized(logits)`."""

    def _output(self, y: Tensor) -> Tensor:
        logits = super()._output(y)
        if logits is not y and logits.requires_grad and not torch.compiler.is_compiling():
            logits._asymq_unquantized = (y, self.output_quantizer)
        return logits


def unquantized(logits: Tensor) -> tuple[Tensor, QuantAct] | None:
    """What a QuantLogits returned before its quantizer, and that; None if it is unknown."""
    return getattr(logits, "_asymq_unquantized", None)


def is_conv1d(cls: type) -> bool:
    """Whether it is transformers' Conv1D, without importing transformers."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
