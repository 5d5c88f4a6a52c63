"""The quantizer of an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from asymq.quantizers.quantizer import Quantizer
from asymq.quantizers.spec import QuantSpec


class QuantAct(Quantizer):
    """Quantizes an activation, of any shape.

    spec: what it is. channels: size of the axis that a per-channel or per-group granularity names
    (needed there; the last axis by default). Ranges have shape [1], [channels] or [groups] and are
    float32, or with dtype float64, for float64 activations alone. kind: "activation", "input" (what
    a layer multiplies its weight with) or "cache" (attention's keys and values).
    """

    def __init__(
        self,
        spec: QuantSpec,
        channels: int | None = None,
        *,
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        kind: str = "activation",
    ):
        shape = spec.granularity.of_activation(name or "QuantAct", channels)
        super().__init__(spec, shape, name, device, dtype)
        self.channels = channels
        self.kind = kind

    @classmethod
    def on_last_axis(
        cls,
        spec: QuantSpec,
        channels: int | None,
        name: str = "",
        device=None,
        kind: str = "activation",
    ) -> QuantAct:
        """Where only the size of the last axis is known; None: not even that."""
        spec.granularity.need_last_axis(name or cls.__name__)
        return cls(spec, channels, name=name, device=device, kind=kind)

    def shape_on(self, x: Tensor) -> torch.Size:
        return self.spec.granularity.on_activation(self, x, self.channels)
