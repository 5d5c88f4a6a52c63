"""The quantizer of a weight, and of one that several modules share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asymq.quantizers import functions
from asymq.quantizers.quantizer import QUANTIZING, Quantizer
from asymq.quantizers.sharing import results, unchanged
from asymq.quantizers.spec import QuantSpec


class WeightQuantizer(Quantizer):
    """Quantizes a weight. Modules with tied weights share one.

    shape: the weight's. channel_axis, reduction_axis: where a granularity without an axis applies.
    Ranges have the shape [1] or as many dimensions as the weight.
    """

    kind = "weight"

    def __init__(
        self,
        spec: QuantSpec,
        shape: Sequence[int],
        *,
        channel_axis: int = 0,
        reduction_axis: int = -1,
        name: str = "",
        device: torch.device | str | None = None,
    ):
        ranges = spec.granularity.of_weight(
            name or type(self).__name__, shape, channel_axis, reduction_axis
        )
        super().__init__(spec, ranges, name, device)
        self.weight_shape = torch.Size(shape)
        self.fan_in = shape[reduction_axis]
        # Of a live range along the last axis, which one kernel finds and applies.
        of_rows = len(ranges) > 1 and ranges[:-1] == self.weight_shape[:-1]
        self._group = shape[-1] // ranges[-1] if of_rows else None

    @property
    def typical_end(self) -> float:
        """Of the range of a weight that says nothing: the bound of torch's own initialization."""
        return max(1, self.fan_in) ** -0.5

    def elements_of_sample(self, x: Tensor) -> int:
        """All of them: a weight has no batches."""
        return self.weight_shape.numel()

    @property
    def uses(self) -> float:
        """Any number: its users may call each other."""
        return math.inf

    def shape_on(self, x: Tensor) -> torch.Size:
        if x.shape != self.weight_shape:
            raise RuntimeError(
                f"{self.label}: its weight had the shape {list(self.weight_shape)}, now it has "
                f"{list(x.shape)}: resize a model before quantizing it"
            )
        return self.range_shape

    def fake_quantize(self, x: Tensor) -> Tensor:
        if not self.live or self._group is None:
            return super().fake_quantize(x)
        if not self.reached:
            self._reach()
        self.shape_on(x)
        factors = (getattr(self, name) for name in self.spec.learnable)
        return functions.namespace()._fake_quantize_live(
            x, *factors, group=self._group, symmetric=self.spec.symmetric, **self._options_on(x)
        )

    def forward(self, weight: Tensor) -> Tensor:
        kept = results() if self.users > 1 else None
        if kept is not None and (first := kept.setdefault(id(self), weight)) is not weight:
            if elements(weight) != elements(first):
                raise RuntimeError(
                    f"{self.label}: the weights that share it were one tensor when the model was "
                    "prepared and are not any more: tie them again (model.tie_weights()), or untie "
                    "them before asymq.prepare"
                )
        if self._state != QUANTIZING:
            return super().forward(weight)
        return unchanged(self, weight, self.range_tensors, super().forward)


class NormWeightQuantizer(WeightQuantizer):
    """Quantizes the weight of a normalization layer, which is calibrated like an activation."""

    kind = "norm_weight"

    @property
    def typical_end(self) -> float:
        return 1.0


def elements(tensor: Tensor) -> tuple:
    """Equal for two tensors exactly if they are the same elements of memory. Tensors without memory
    go by identity."""
    if tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
    )
