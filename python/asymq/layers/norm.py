"""Normalization layers: nn.LayerNorm, and RMSNorm as each library writes it."""

from __future__ import annotations

import functools
import inspect
import sys
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from asymq.layers import fused, registry
from asymq.layers.layer import NORM_WEIGHT, QuantNorm
from asymq.layers.registry import quantizes
from asymq.quantizers import Quantizer, QuantSpec, apply, is_unobserved


@quantizes(nn.LayerNorm)
class QuantLayerNorm(QuantNorm, nn.LayerNorm):
    """nn.LayerNorm with a quantized weight, input and output; None: not quantized.

    Range shapes of the weight: [1], [channels], [channels / size].
    """

    float_class = nn.LayerNorm
    made_of = "nn.LayerNorm"
    weight: nn.Parameter  # None with elementwise_affine=False, and so is its quantizer

    def __init__(
        self,
        *args,
        weight: QuantSpec | None = NORM_WEIGHT,
        output: QuantSpec | None = None,
        input: QuantSpec | None = None,
        **kwargs,
    ):
        nn.LayerNorm.__init__(self, *args, **kwargs)
        self._create(weight, output, input)

    @classmethod
    def output_channels(cls, module: nn.Module) -> int:
        assert isinstance(module, nn.LayerNorm)
        return module.normalized_shape[-1]

    input_channels = output_channels

    def forward(self, input: Tensor) -> Tensor:
        x = apply(self.input_quantizer, input)
        y = F.layer_norm(x, self.normalized_shape, self.quantized_weight(), self.bias, self.eps)
        return self.quantize_output(y)


@quantizes("*RMSNorm", "T5LayerNorm")
class QuantRMSNorm(QuantNorm):
    """A normalization by the root mean square, with a quantized weight, input and output; None: not
    quantized.

    Its own forward runs, with the weight read through its quantizer. Some multiply with 1 + weight
    (Gemma's): it is the weight that is quantized. Range shapes as those of a LayerNorm.
    """

    made_of = "an RMSNorm with one weight"

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        members = super().own_members(float_class)
        if not is_llama_norm(float_class):  # type: ignore[arg-type]
            return members
        step_by_step = members["forward"]

        @functools.wraps(step_by_step)
        def forward(self, hidden_states: Tensor) -> Tensor:
            x, quantizer = hidden_states, self.output_quantizer
            alone = quantizer is not None and self.input_quantizer is None
            if alone and fused.may_normalize(x, self.weight, quantizer):
                return fused.rms_norm(x, self.quantized_weight(), self.variance_epsilon, quantizer)
            return step_by_step(self, x)

        return members | {"forward": forward}

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        return registry.find(type(module)) is cls and not cls.left_alone(module)

    @classmethod
    def left_alone(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        alone = weight is None or weight.dim() != 1 or len(list(module.parameters())) != 1
        return alone or super().left_alone(module)


# To mypy a class is not hashable: calls need an ignore.
@functools.cache
def is_llama_norm(cls: type[nn.Module]) -> bool:
    """Whether a float class computes what transformers' LlamaRMSNorm does, by the same code: most
    families have a copy of their own."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None or "transformers" not in sys.modules:
        return False
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return _what_runs(code) == _what_runs(inspect.unwrap(LlamaRMSNorm.forward).__code__)


def _what_runs(code: CodeType) -> tuple:
    constants = [c for c in code.co_consts if not isinstance(c, str)]  # no docstring
    return code.co_code, code.co_names, constants


def normalize_into(norm: nn.Module, x: Tensor, quantizer: Quantizer) -> Tensor | None:
    """quantizer(norm(x)) in one, with a quantizer that is not the norm's own; None: not as
    LlamaRMSNorm, or somebody would notice that neither is called."""
    own = isinstance(norm, QuantRMSNorm)
    if own and (norm.input_quantizer is not None or norm.output_quantizer is not None):
        return None
    cls = norm.float_class if own else type(norm)
    if not is_unobserved(norm) or not is_llama_norm(cls):  # type: ignore[arg-type]
        return None
    weight, eps = norm.weight, norm.variance_epsilon
    assert isinstance(weight, Tensor) and isinstance(eps, float)
    if not fused.may_normalize(x, weight, quantizer):
        return None
    return fused.rms_norm(x, norm.quantized_weight() if own else weight, eps, quantizer)
