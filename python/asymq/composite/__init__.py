"""The operators ``torch.ops.asymq.*`` of single operations of PyTorch, for where no native library
fits: under the same names and schemas, private ones included, with the same results, gradients and
refusals, on every device that has float64.

``schema`` says what there is, ``public`` what the public operators become, ``quantize`` and
``fused`` what the private ones do, with the mathematics of ``asymq.reference``, ``autograd`` how
they are differentiated, ``checks`` what they refuse.
"""

from collections.abc import Callable

import torch

from asymq.composite import autograd, fused, public, quantize
from asymq.composite.schema import SCHEMAS

_library: torch.library.Library | None = None  # what it registered goes with it


def register() -> None:
    """Once in a process, and never beside the native library."""
    global _library
    _library = torch.library.Library("asymq", "DEF")
    for schema in SCHEMAS:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = quantize.KERNELS | fused.KERNELS
    of_keys: dict[str, dict[str, Callable]] = {
        "CompositeImplicitAutograd": public.functions(),
        "CompositeExplicitAutograd": kernels,
        "Meta": quantize.SHAPES,
        "Autograd": autograd.kernels(kernels),
    }
    for key, functions in of_keys.items():
        for name, function in functions.items():
            _library.impl(name, function, key)
