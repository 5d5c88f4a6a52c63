"""Quantization-aware training with learnable asymmetric ranges.

The fake-quantize functions are differentiable with respect to x and to the range. Each is the
operator ``torch.ops.asymq.<name>``, with native CPU and CUDA kernels or, where no library fits this
torch, of single operations of PyTorch (:func:`implementation` tells); ``asymq.reference`` holds the
same functions in plain PyTorch.
"""

import importlib

from asymq import _library, _moved

_library.load()
_moved.install()

from asymq import integrations  # noqa: E402
from asymq._build import VERSION as __version__  # noqa: E402
from asymq._library import implementation  # noqa: E402
from asymq.calibration import calibrate  # noqa: E402
from asymq.checkpoint import load, save  # noqa: E402
from asymq.config import QuantConfig  # noqa: E402
from asymq.conversion import convert  # noqa: E402
from asymq.layers import (  # noqa: E402
    QuantConv1d,
    QuantConv2d,
    QuantEmbedding,
    QuantLayerNorm,
    QuantLinear,
    QuantRMSNorm,
)
from asymq.ops import (  # noqa: E402
    dequantize,
    effective_scale_offset,
    fake_quantize_beta_gamma,
    fake_quantize_dynamic_beta_gamma,
    fake_quantize_dynamic_symmetric_gamma,
    fake_quantize_kscale_koffset,
    fake_quantize_min_max,
    fake_quantize_scale_offset,
    fake_quantize_symmetric_gamma,
    fake_quantize_symmetric_max,
    fake_quantize_symmetric_scale,
    quantize,
    quantized_kl_div,
    update_codes_,
)
from asymq.preparation import prepare  # noqa: E402
from asymq.quantizers import (  # noqa: E402
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantAct,
    QuantSpec,
    convert_parameterization,
    disable_quantizers,
    enable_quantizers,
    named_quantizers,
    use_functions,
)
from asymq.seeing import RangeLogger, diagnose, plot_ranges  # noqa: E402
from asymq.summary import summary  # noqa: E402
from asymq.training import (  # noqa: E402
    OscillationObserver,
    SelfDistillation,
    TransitionRateScheduler,
    attach_step_rule,
    capture_step,
    freeze_weight_ranges,
    freeze_weights,
    range_parameters,
    recommended,
    shard,
    weight_parameters,
)

__all__ = [
    "OscillationObserver",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QuantAct",
    "QuantConfig",
    "QuantConv1D",
    "QuantConv1d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLayerNorm",
    "QuantLinear",
    "QuantRMSNorm",
    "QuantSpec",
    "RangeLogger",
    "SelfDistillation",
    "TransitionRateScheduler",
    "__version__",
    "attach_step_rule",
    "calibrate",
    "capture_step",
    "convert",
    "convert_parameterization",
    "dequantize",
    "diagnose",
    "disable_quantizers",
    "effective_scale_offset",
    "enable_quantizers",
    "export_checkpoint",
    "export_encodings",
    "export_onnx",
    "fake_quantize_beta_gamma",
    "fake_quantize_dynamic_beta_gamma",
    "fake_quantize_dynamic_symmetric_gamma",
    "fake_quantize_kscale_koffset",
    "fake_quantize_min_max",
    "fake_quantize_scale_offset",
    "fake_quantize_symmetric_gamma",
    "fake_quantize_symmetric_max",
    "fake_quantize_symmetric_scale",
    "freeze_weight_ranges",
    "freeze_weights",
    "implementation",
    "load",
    "named_quantizers",
    "plot_ranges",
    "prepare",
    "quantize",
    "quantized_kl_div",
    "range_parameters",
    "recommended",
    "reference",
    "save",
    "scaling_law",
    "shard",
    "summary",
    "update_codes_",
    "use_functions",
    "weight_parameters",
]

integrations.install()


def __getattr__(name: str):
    """What is read when it is asked for: it costs time, or needs transformers."""
    if name in ("reference", "scaling_law"):
        return importlib.import_module(f"asymq.{name}")
    if name in ("export_checkpoint", "export_encodings", "export_onnx"):
        return getattr(importlib.import_module("asymq.export"), name)
    if name == "QuantConv1D":
        return importlib.import_module("asymq.layers.conv1d").QuantConv1D
    raise AttributeError(f"module 'asymq' has no attribute {name!r}")
