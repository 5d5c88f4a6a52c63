"""Modules of version 0.1 under their old names, with one DeprecationWarning each."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old module to where its names are now.
_MOVED = {
    "asymq.attention": ("asymq.layers.attention",),
    "asymq.loss": ("asymq.layers.loss",),
    "asymq.modules": ("asymq.layers", "asymq.layers.layer", "asymq.layers.loss"),
    "asymq.quantizer": ("asymq.quantizers", "asymq.quantizers.quantizer"),
    "asymq.specs": ("asymq.quantizers", "asymq.config", "asymq.quantizers.spec"),
}


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None):
        return ModuleSpec(name, self) if name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        places = [importlib.import_module(place) for place in _MOVED[module.__name__]]
        warnings.warn(
            f"{module.__name__} is now {_MOVED[module.__name__][0]}; the old name will go with "
            "version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        for place in reversed(places):
            names = {k: v for k, v in vars(place).items() if not k.startswith("__")}
            module.__dict__.update(names)


def install() -> None:
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
