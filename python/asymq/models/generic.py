"""Any model: the layers that are registered get quantizers, known families within it all theirs,
models of transformers what their structure says, the rest none."""

from __future__ import annotations

import sys
from collections import Counter

from torch import nn

from asymq.layers import Quantized, QuantLayer, registry
from asymq.models import family_of
from asymq.models.sites import Plan, is_adapter
from asymq.quantizers import Quantizer


def plan(plan: Plan, model: nn.Module) -> None:
    left_alone: Counter[str] = Counter()
    done: list[str] = []  # prefixes of what somebody else has planned
    structure = _structure(plan)
    found = families = False
    for name, module in model.named_modules():
        if f"{name}.".startswith(tuple(done)) or _is_of_adapter(name):
            continue
        family = family_of(module) if name else None
        base = None if isinstance(module, Quantized) else registry.find(type(module))
        if family is not None:
            family.plan(plan.below(name), module)
            done.append(f"{name}.")
            families = True
        elif name and is_adapter(module):
            (structure or plan).layer(name)
            done.append(f"{name}.")
            found = True
        elif base is not None and not issubclass(base, QuantLayer):
            plan.becomes(name, base)
        elif structure is not None and structure.stays_float(name):
            if any(True for _ in module.parameters(recurse=False)):
                left_alone[type(module).__name__] += 1
        elif name and base is not None and not base.left_alone(module):
            (structure or plan).layer(name)
            found = True
        elif isinstance(module, (Quantized, Quantizer)):
            found = True  # the user's own, which stay
        else:
            if structure is not None:
                structure.module(name, module)
            if not plan.has(module) and any(True for _ in module.parameters(recurse=False)):
                left_alone[type(module).__name__] += 1
    if structure is not None:
        structure.end()
    if registry.find(type(model)) and not found:
        raise ValueError(
            f"asymq.prepare: {type(model).__name__} is a layer itself, and a model is what has "
            f"layers: wrap it, as in nn.Sequential({type(model).__name__}(...))"
        )
    if not found and not families:
        raise ValueError(
            f"asymq.prepare: {type(model).__name__} has no {registry.names()} layer to quantize"
        )
    unknown = None if structure is None else structure.unknown()
    if left_alone or unknown is not None:
        what = [f"{count} {name}" for name, count in sorted(left_alone.items())]
        plan.left_float.append(
            f"asymq.prepare: {type(model).__name__} is not a model whose every operation asymq "
            "knows: what happens between its layers is not quantized"
            + (f" ({'; '.join(unknown)})" if unknown else "")
            + (f", and left alone: {', '.join(what)}" if what else "")
        )


def _is_of_adapter(name: str) -> bool:
    """Whether a module is what an adapter adds to the model, which stays float: LoRA's matrices,
    whoever wrote it, and peft's prompts."""
    return any(part.startswith("lora_") or part == "prompt_encoder" for part in name.split("."))


def _structure(plan: Plan):
    """What knows transformers, where that has been imported."""
    if "transformers" not in sys.modules:
        return None
    from asymq.models.structure import Structure

    return Structure(plan)
