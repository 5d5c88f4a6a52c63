"""What layers with a weight share: quantizers of their weight, input and output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from asymq.layers.quantized import Quantized, need_own_forward, own_forward, put_in, twin
from asymq.quantizers import (
    NormWeightQuantizer,
    PerChannel,
    QuantAct,
    Quantizer,
    QuantSpec,
    WeightQuantizer,
    apply,
)

# What a layer gets where nothing is said (the paper's section 4).
WEIGHT = QuantSpec(bits=4, symmetric=True, granularity=PerChannel())
NORM_WEIGHT = QuantSpec(bits=12)


class QuantLayer(Quantized):
    """A layer with a weight, whose float class is `float_class`."""

    sites = ("weight_quantizer", "input_quantizer", "output_quantizer")
    kinds: ClassVar[Mapping[str, str]] = {"input_quantizer": "input"}
    public = True
    weight: Tensor
    weight_quantizer: WeightQuantizer | None
    input_quantizer: QuantAct | None
    output_quantizer: QuantAct | None

    kind: ClassVar[str] = "weight"
    weight_quantizer_class: ClassVar[type[WeightQuantizer]] = WeightQuantizer
    # Axes of the weight where a granularity names none.
    channel_axis: ClassVar[int] = 0
    reduction_axis: ClassVar[int] = -1
    # Whether the output is anything but the weight's own values.
    has_output: ClassVar[bool] = True
    # Whether it multiplies its weight with an input whose last axis holds the channels.
    multiplies: ClassVar[bool] = True
    # What from_float takes, in its error's words.
    made_of: ClassVar[str]

    @classmethod
    def output_channels(cls, module: nn.Module) -> int | None:
        """Size of the last axis of what a float module of this type returns."""
        return weight_of(module).shape[cls.channel_axis]

    @classmethod
    def input_channels(cls, module: nn.Module) -> int | None:
        return weight_of(module).shape[cls.reduction_axis]

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        return own_forward(float_class, "weight")

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        """Whether a float module is of the type that this one quantizes."""
        return isinstance(module, cls.float_class)

    @classmethod
    def left_alone(cls, module: nn.Module) -> bool:
        """Whether `prepare` passes over such a module, and lists it."""
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and not weight.is_floating_point()

    @classmethod
    def check(cls, module: nn.Module, weight: QuantSpec | None, label: str) -> None:
        """ValueError where a module's weight cannot be read through a quantizer."""
        need_own_forward(module, label)
        if "weight" not in module._parameters:
            raise ValueError(
                f"{label}: its weight is computed (by weight_norm, spectral_norm, prune or "
                "parametrize), and would be computed anew after asymq.convert; make it a plain "
                "parameter first (remove_parametrizations, remove_weight_norm, prune.remove)"
            )
        if isinstance(module.weight, UninitializedParameter):
            raise ValueError(
                f"{label}: its weight has no shape yet; run a batch through the model first"
            )
        if module.weight is None and weight is not None:
            raise ValueError(f"{label}: the layer has no weight to quantize: weight must be None")

    @classmethod
    def make_quantizers(
        cls,
        module: nn.Module,
        weight: QuantSpec | None,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
        *,
        name: str = "",
        device: torch.device | None = None,
    ) -> dict[str, Quantizer | None]:
        """Quantizers of a float module by site, named after the module `name`. device: of those of
        a module without parameters."""
        label = name or f"Quant{type(module).__name__.removeprefix('Quant')}"
        cls.check(module, weight, label)
        if not cls.has_output and (output or input):
            raise ValueError(
                f"{label}: takes indices and returns values of its weight's grid; output and "
                "input must be None"
            )
        if module.weight is not None:
            device = weight_of(module).device
        prefix = f"{name}." if name else ""

        def act(site: str, spec: QuantSpec | None, channels: int | None) -> QuantAct | None:
            if spec is None:
                return None
            kind = cls.kinds.get(site, "activation")
            return QuantAct.on_last_axis(spec, channels, f"{prefix}{site}", device, kind)

        return {
            "weight_quantizer": (
                None if weight is None else cls.make_weight_quantizer(module, weight, prefix)
            ),
            "output_quantizer": act("output_quantizer", output, cls.output_channels(module)),
            "input_quantizer": act("input_quantizer", input, cls.input_channels(module)),
        }

    @classmethod
    def make_weight_quantizer(
        cls, module: nn.Module, spec: QuantSpec, prefix: str = ""
    ) -> WeightQuantizer:
        return cls.weight_quantizer_class(
            spec,
            tuple(weight_of(module).shape),
            channel_axis=cls.channel_axis,
            reduction_axis=cls.reduction_axis,
            name=f"{prefix}weight_quantizer",
            device=weight_of(module).device,
        )

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weight: QuantSpec | None = WEIGHT,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
    ) -> QuantLayer:
        """A new layer that shares the parameters of a float one, which stays as it is.

        ValueError: it is of another class than `float_class`, or cannot have these quantizers.
        """
        if not cls.serves(module):
            raise ValueError(
                f"{cls.__name__}.from_float: needs {cls.made_of}, got {type(module).__name__}"
            )
        quantizers = cls.make_quantizers(module, weight, output, input)
        layer = twin(module)
        put_in(layer, cls, quantizers)
        return layer

    def _create(self, weight, output, input) -> None:
        """Gives a layer its quantizers that was made as a quantized one."""
        quantizers = self.make_quantizers(self, weight, output, input)
        for name in self.sites:
            setattr(self, name, quantizers[name])

    def quantized_weight(self) -> Tensor:
        """The weight that a forward multiplies with."""
        return apply(self.weight_quantizer, self.weight)

    def quantize_output(self, y: Tensor) -> Tensor:
        quantizer = self.output_quantizer
        if quantizer is None:
            return y
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{quantizer.label}: the layer must return a tensor to quantize, got "
                f"{type(y).__name__}; leave this quantizer out (skip)"
            )
        return quantizer(y)


class QuantNorm(QuantLayer):
    """A normalization layer, whose weight is calibrated like an activation."""

    kind = "norm_weight"
    weight_quantizer_class = NormWeightQuantizer
    multiplies = False

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weight: QuantSpec | None = NORM_WEIGHT,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
    ) -> QuantLayer:
        """As that of any layer. Without a weight, weight must be None."""
        return super().from_float(module, weight, output, input)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a float layer that has one."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
