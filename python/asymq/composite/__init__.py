"""The operators ``torch.ops.asymq.*`` of single operations of PyTorch, for where no native library
fits: under the same names and schemas, private ones included, with the same results, gradients and
refusals, on every device that has float64.

``schema`` says what there is, ``public`` what the public operators become, ``quantize`` and
``fused`` what the private ones do, with the mathematics of ``asymq.reference``, ``autograd`` how
they are differentiated, ``checks`` what they refuse.
"""

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
    for name, function in public.functions().items():
        _library.impl(name, function, "CompositeImplicitAutograd")
    for name, function in (quantize.KERNELS | fused.KERNELS).items():
        _library.impl(name, function, "CompositeExplicitAutograd")
    for name, function in quantize.SHAPES.items():
        _library.impl(name, function, "Meta")
    for name in quantize.KERNELS | fused.KERNELS:
        function = autograd.kernel(name)
        if function is not None:
            _library.impl(name, function, "Autograd")
