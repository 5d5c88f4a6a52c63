"""Any model: its Linear, Conv1D, Embedding and LayerNorm layers get quantizers, the rest none."""

from __future__ import annotations

import warnings
from collections import Counter

from torch import nn

from asymq.preparation import Preparation


def plan(preparation: Preparation, model: nn.Module) -> None:
    left_alone: Counter[str] = Counter()
    found = False
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            preparation.refuse_fast_path(module)
        if name and preparation.can_wrap(module):
            preparation.wrap(name)
            found = True
        elif any(True for _ in module.parameters(recurse=False)):
            left_alone[type(module).__name__] += 1
    if not found:
        raise ValueError(
            f"asymq.prepare: {type(model).__name__} has no Linear, Conv1D, Embedding or LayerNorm "
            "layer to quantize"
        )
    # Of transformers' models users expect more than the layers.
    if left_alone or hasattr(getattr(model, "config", None), "model_type"):
        what = [f"{count} {name}" for name, count in sorted(left_alone.items())]
        warnings.warn(
            f"asymq.prepare: {type(model).__name__} is not a model whose every operation asymq "
            "knows: what happens between its layers is not quantized, and left alone: "
            + (", ".join(what) or "nothing else"),
            stacklevel=4,
        )
