"""Where a model family has its quantizers: a file per family of transformers, named after its
`config.model_type`.

Each has ``MODEL``, the class it prepares, and ``plan(plan, model)``, which names the quantizers of
all sites. Every other model is planned by `generic.py`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from torch import nn


def family_of(model: nn.Module):
    """The file that knows this model; None: none does."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type.isidentifier():
        name = f"{__name__}.{model_type}"
        if find_spec(name):
            family = import_module(name)
            if isinstance(model, getattr(family, "MODEL", ())):
                return family
    return None
