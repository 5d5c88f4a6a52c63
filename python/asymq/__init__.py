"""Quantization-aware training with learnable asymmetric ranges.

The fake-quantize functions are differentiable with respect to x and to the range. Each is the
operator ``torch.ops.asymq.<name>`` with CPU and CUDA kernels; ``asymq.reference`` holds the same
functions in plain PyTorch.
"""

from asymq import _library

_library.load()

from asymq._build import VERSION as __version__  # noqa: E402
from asymq.calibration import calibrate  # noqa: E402
from asymq.checkpoint import load, save  # noqa: E402
from asymq.modules import QuantEmbedding, QuantLayerNorm, QuantLinear  # noqa: E402
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
from asymq.preparation import convert, prepare  # noqa: E402
from asymq.quantizer import (  # noqa: E402
    QuantAct,
    convert_parameterization,
    disable_quantizers,
    enable_quantizers,
    named_quantizers,
)
from asymq.specs import (  # noqa: E402
    PerChannel,
    PerGroup,
    PerTensor,
    QuantConfig,
    QuantSpec,
)
from asymq.summary import summary  # noqa: E402
from asymq.training import (  # noqa: E402
    attach_step_rule,
    capture_step,
    freeze_weights,
    range_parameters,
)

__all__ = [
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QuantAct",
    "QuantConfig",
    "QuantEmbedding",
    "QuantLayerNorm",
    "QuantLinear",
    "QuantSpec",
    "__version__",
    "attach_step_rule",
    "calibrate",
    "capture_step",
    "convert",
    "convert_parameterization",
    "dequantize",
    "disable_quantizers",
    "effective_scale_offset",
    "enable_quantizers",
    "fake_quantize_beta_gamma",
    "fake_quantize_kscale_koffset",
    "fake_quantize_min_max",
    "fake_quantize_scale_offset",
    "fake_quantize_symmetric_gamma",
    "fake_quantize_symmetric_max",
    "fake_quantize_symmetric_scale",
    "freeze_weights",
    "load",
    "named_quantizers",
    "prepare",
    "quantize",
    "range_parameters",
    "save",
    "summary",
]
