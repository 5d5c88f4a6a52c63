"""Any model: its Linear, Conv1D, Embedding and LayerNorm layers get quantizers, the rest none."""

from __future__ import annotations

import warnings
from collections import Counter

from torch import nn

from asymq.preparation import Preparation


def plan(preparation: Preparation, model: nn.Module) -> None:
    left_alone: Counter[str] = Counter()
    wrapped: set[int] = set()
    for name, module in model.named_modules():
        if name and preparation.can_wrap(module):
            preparation.wrap(name)
            wrapped.add(id(module))
        elif any(True for _ in module.parameters(recurse=False)):
            left_alone[type(module).__name__] += 1
    if not wrapped:
        raise ValueError(
            f"asymq.prepare: {type(model).__name__} has no Linear, Conv1D, Embedding or LayerNorm "
            "layer to quantize"
        )
    if left_alone:
        what = ", ".join(f"{count} {name}" for name, count in sorted(left_alone.items()))
        warnings.warn(
            f"asymq.prepare: {type(model).__name__} is not a model whose every operation asymq "
            f"knows; its layers are quantized, these with parameters were left alone: {what}",
            stacklevel=4,
        )
