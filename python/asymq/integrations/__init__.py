"""What asymq adds to other libraries, each in a file that imports its library."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The module of the other library that ours adds to.
_ADDS_TO = {
    "aimet_torch.quantization.affine.backends": "asymq.integrations.aimet",
    "modelopt.torch.quantization.nn.modules.tensor_quantizer": "asymq.integrations.modelopt",
    "transformers.quantizers.auto": "asymq.integrations.transformers",
}


class _Integrations(MetaPathFinder):
    """Imports ours right after the module that it adds to: that takes longer to import than asymq,
    which does not wait for it, and users import the two in either order."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None):
        spec = PathFinder.find_spec(name, path, target) if name in _ADDS_TO else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Both(spec.loader)
        return spec


class _Both(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _import_integration(module.__name__)


def _import_integration(name: str) -> None:
    """An import of another library goes on where asymq does not know that version of it, whatever
    error that gives."""
    try:
        importlib.import_module(_ADDS_TO[name])
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"asymq: {_ADDS_TO[name]} is not available: {problem}", stacklevel=2)


def install() -> None:
    """Adds to what is imported already, and to what will be."""
    for name in _ADDS_TO:
        if name in sys.modules:
            _import_integration(name)
    if not any(isinstance(finder, _Integrations) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Integrations())
