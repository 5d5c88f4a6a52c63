"""Which quantized class serves which float class.

A layer type is a class in a file of this folder, with the decorator `quantizes`. Its subclasses are
served too, with their own forward. Where libraries define the same type again and again, a wildcard
name stands for all classes so called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from asymq.layers.quantized import Quantized

Base = TypeVar("Base", bound=type[Quantized])
_BASES: dict[type[nn.Module], type[Quantized]] = {}
_NAMED: dict[str, type[Quantized]] = {}
# Files whose float classes need a package that asymq does not: read when such a class appears.
_LATER = {("transformers.pytorch_utils", "Conv1D"): "asymq.layers.conv1d"}


def quantizes(*float_classes: type[nn.Module] | str) -> Callable[[Base], Base]:
    """Registers the decorated class for float classes, or wildcard names of such, and their
    subclasses."""

    def register(base: Base) -> Base:
        for float_class in float_classes:
            if isinstance(float_class, str):
                _NAMED[float_class] = base
            else:
                _BASES[float_class] = base
        return base

    return register


def find(cls: type[nn.Module]) -> type[Quantized] | None:
    """What serves modules of this class; None: nothing does."""
    for float_class in cls.__mro__:
        later = _LATER.get((float_class.__module__, float_class.__name__))
        if later is not None:
            importlib.import_module(later)
        if float_class in _BASES:
            return _BASES[float_class]
        for name, base in _NAMED.items():
            if fnmatchcase(float_class.__name__, name):
                return base
    return None


def names() -> str:
    """The float classes, as messages list them."""
    known = [cls.__name__ for cls in _BASES if "weight_quantizer" in _BASES[cls].sites]
    known += [name for _, name in _LATER if name not in known]
    known += [name.removeprefix("*") for name in _NAMED]
    return ", ".join(known[:-1]) + f" or {known[-1]}"
