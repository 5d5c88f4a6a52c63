"""The quantizer of a weight, and of one that several modules share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from asymq.quantizers.quantizer import QUANTIZING, Quantizer
from asymq.quantizers.spec import QuantSpec

_thread = threading.local()


@contextmanager
def sharing() -> Iterator[None]:
    """One forward of a model in this thread, within which a quantizer with several users quantizes
    their weight once. Nothing outlives it."""
    if getattr(_thread, "results", None) is not None:
        yield
        return
    _thread.results = {}
    try:
        yield
    finally:
        _thread.results = None


def _circumstances() -> tuple:
    """What a result depends on beside the weight and its range: a graph is recorded or not, a
    checkpointed region keeps what it computes in its own way, a backward computes it again."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._current_graph_task_id(),
    )


def _version(tensor: Tensor) -> int:
    """Changes with the tensor, except in inference mode, where nothing can be trained."""
    return 0 if tensor.is_inference() else tensor._version


class WeightQuantizer(Quantizer):
    """Quantizes a weight. Modules with tied weights share one.

    shape: the weight's. channel_axis, reduction_axis: where a granularity without an axis applies.
    Ranges have the shape [1] or as many dimensions as the weight. ``shared``: it has several users.
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
        self.shared = False

    @property
    def typical_end(self) -> float:
        """Of the range of a weight that says nothing: the bound of torch's own initialization."""
        return max(1, self.fan_in) ** -0.5

    def shape_on(self, x: Tensor) -> torch.Size:
        if x.shape != self.weight_shape:
            raise RuntimeError(
                f"{self.label}: its weight had the shape {list(self.weight_shape)}, now it has "
                f"{list(x.shape)}: resize a model before quantizing it"
            )
        return self.range_shape

    def forward(self, weight: Tensor) -> Tensor:
        # A compiler merges equal operations by itself.
        if not self.shared or self._state != QUANTIZING or torch.compiler.is_compiling():
            return super().forward(weight)
        results = getattr(_thread, "results", None)
        if results is None:
            return super().forward(weight)
        first = results.setdefault(id(self), weight)
        if weight is not first and elements(weight) != elements(first):
            raise RuntimeError(
                f"{self.label}: the weights that share it were one tensor when the model was "
                "prepared and are not any more: tie them again (model.tie_weights()), or untie "
                "them before asymq.prepare"
            )
        versions = tuple(_version(t) for t in (weight, *self.range_tensors().values()))
        key = (id(self), id(weight), versions, *_circumstances())
        if key not in results:
            # Beside its weight, which must live as long as its identity stands for it.
            results[key] = super().forward(weight), weight
        return results[key][0]


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
