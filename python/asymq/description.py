"""What a prepared model is on disk: its tensors, and asymq.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asymq.quantizers import QuantSpec, elements, is_split, named_quantizers

DESCRIPTION = "asymq.json"
FORMAT = 1
_FIELDS = {"format", "class", "dtype", "config", "generation_config", "quantizers"}


def describe(model: nn.Module) -> dict[str, Any]:
    """The class of a prepared model, its settings, and its quantizers by name."""
    return {
        "format": FORMAT,
        "class": type(model).__name__.removeprefix("FSDP"),
        "dtype": str(_weight_dtype(model)).removeprefix("torch."),
        "config": _settings(model, "config"),
        "generation_config": _settings(model, "generation_config"),
        "quantizers": {name: q.spec.to_dict() for name, q in named_quantizers(model)},
    }


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state, tied tensors once under their first name. Of a model that FSDP2 has split, every
    process must call this."""
    state: dict[str, Tensor] = {}
    first: dict[int | tuple, str] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if is_split(tensor) else tensor
        key = id(tensor) if tensor is not whole else elements(whole)
        if first.setdefault(key, name) == name:
            state[name] = whole.contiguous()
    return state


def encode(description: dict[str, Any]) -> str:
    return json.dumps(description, indent=1) + "\n"


def read(path: Path, what: str) -> dict[str, Any]:
    """The description in the file `path`, its quantizers as QuantSpecs. ValueError, in which `what`
    is who reads it: there is none, or it is incomplete, damaged or of a later version."""
    none = f"{what}: {path.parent} holds no model saved by asymq"
    try:
        description = json.loads(path.read_text())
        missing = sorted(_FIELDS - description.keys())
    except (OSError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{none}: {error}") from None
    if description.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{what}: {path} has the format {description['format']!r}, this version of asymq "
            f"reads {FORMAT}: use the version that saved it, or a later one"
        )
    if missing:
        raise ValueError(f"{none}: {path} lacks {', '.join(missing)}")
    try:
        specs = {k: QuantSpec.from_dict(v) for k, v in description["quantizers"].items()}
    except ValueError as error:
        raise ValueError(f"{what}: {path}: {error}") from None
    return {**description, "quantizers": specs}


def _settings(model: nn.Module, name: str) -> dict | None:
    """transformers' settings of a model; None where there are none, or they are something else."""
    to_dict = getattr(getattr(model, name, None), "to_dict", None)
    return None if to_dict is None else to_dict()


def _weight_dtype(model: nn.Module) -> torch.dtype:
    ranges = {id(p) for _, q in named_quantizers(model) for p in q.parameters()}
    weights = (p.dtype for p in model.parameters() if id(p) not in ranges)
    return next(weights, torch.float32)
