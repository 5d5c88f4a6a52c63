"""Quantization-aware training with learnable asymmetric ranges.

The fake-quantize functions are differentiable with respect to x and to the range. Each is the
operator ``torch.ops.asymq.<name>`` with CPU and CUDA kernels; ``asymq.reference`` holds the same
functions in plain PyTorch.
"""

from asymq import _library

_library.load()

from asymq._build import VERSION as __version__  # noqa: E402
from asymq.ops import (  # noqa: E402
    dequantize,
    effective_scale_offset,
    fake_quantize_beta_gamma,
    fake_quantize_kscale_koffset,
    fake_quantize_min_max,
    fake_quantize_scale_offset,
    fake_quantize_symmetric_gamma,
    fake_quantize_symmetric_max,
    fake_quantize_symmetric_scale,
    quantize,
)

__all__ = [
    "__version__",
    "dequantize",
    "effective_scale_offset",
    "fake_quantize_beta_gamma",
    "fake_quantize_kscale_koffset",
    "fake_quantize_min_max",
    "fake_quantize_scale_offset",
    "fake_quantize_symmetric_gamma",
    "fake_quantize_symmetric_max",
    "fake_quantize_symmetric_scale",
    "quantize",
]
