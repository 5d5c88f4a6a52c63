"""A quantization backend of NVIDIA's ModelOpt for its integer formats, `"backend": "asymq"` in a
quantizer's configuration, and amax that learns.

Imported by itself where asymq and modelopt are. ModelOpt's amax is the largest value of a symmetric
grid: s = amax/(2**(bits - 1) - 1), with one step more below zero unless ``narrow_range``; unsigned
the grid is 0 to 2**bits - 1 and s = amax/(2**bits - 1).
"""

from __future__ import annotations

import torch
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    TensorQuantizer,
    register_quant_backend,
)
from torch import Tensor, nn

from asymq import ops

# Only against 0: what has an amax of 0 becomes 0.
_EPS = torch.finfo(torch.float32).tiny


def learn_amax(model: nn.Module) -> list[nn.Parameter]:
    """Makes amax of every calibrated integer quantizer with this backend a parameter, for an
    optimizer, and returns them. Dynamic quantizers have none, and those in ModelOpt's LSQ mode,
    which asks no backend, learn their own.

    Its gradient is the straight-through one of this package's symmetric ranges, and x has none
    where it saturates, whatever ``pass_through_bwd`` says. It keeps its name in the state dict
    and becomes float32.
    """
    found = {}
    for name, quantizer in model.named_modules():
        if not isinstance(quantizer, TensorQuantizer) or quantizer.backend != "asymq":
            continue
        if (
            quantizer.is_enabled
            and not quantizer._dynamic
            and not getattr(quantizer, "_lsq", False)
        ):
            _refuse(quantizer, f"asymq: learn_amax: {name}")
            if quantizer.amax is None:
                raise ValueError(
                    f"asymq: learn_amax: {name} has no amax: calibrate the model first"
                )
            found[name] = quantizer
    if not found:
        raise ValueError(
            'asymq: learn_amax: the model has no quantizer with the backend "asymq": put it into '
            "the configuration of mtq.quantize"
        )
    for quantizer in found.values():
        if not isinstance(quantizer._amax, nn.Parameter):
            amax = quantizer._amax.float()
            del quantizer._amax
            quantizer._amax = nn.Parameter(amax)
    return [quantizer._amax for quantizer in found.values()]


def fake_quantize(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """The backend: inputs, in blocks already where there are any, on quantizer's grid."""
    _refuse(quantizer, 'asymq: backend "asymq" of ModelOpt')
    learned = isinstance(getattr(quantizer, "_amax", None), nn.Parameter)
    amax = quantizer._amax if learned else quantizer._get_amax(inputs)
    bias = quantizer._get_bias(inputs)
    x = inputs if bias is None else inputs - bias
    grid = amax, quantizer.num_bits, quantizer.unsigned, quantizer.narrow_range
    if learned or not quantizer._pass_through_bwd:
        result = _on_grid(x, *grid)
    else:
        result = _PassThrough.apply(x, *grid)
    return result if bias is None else result + bias


def _refuse(quantizer: TensorQuantizer, where: str) -> None:
    bits, blocks = quantizer.num_bits, quantizer.block_sizes or {}
    if not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ValueError(
            f"{where} needs an integer format of 2 to 16 bits, num_bits is {bits}: set the "
            "quantizer's backend to None"
        )
    if blocks.get("type") == "dynamic" or "scale_bits" in blocks:
        raise ValueError(
            f"{where} has no dynamic blocks and no quantized scales, block_sizes is {blocks}: set "
            "the quantizer's backend to None"
        )


def _on_grid(x: Tensor, amax: Tensor, bits: int, unsigned: bool, narrow: bool) -> Tensor:
    amax = amax.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if unsigned:
        scale = amax / (2**bits - 1)
        return ops.fake_quantize_scale_offset(
            x, scale, torch.zeros_like(scale), bits=bits, eps=_EPS
        )
    scale = amax / (2 ** (bits - 1) - 1)
    return ops.fake_quantize_symmetric_scale(x, scale, bits=bits, eps=_EPS, full_range=not narrow)


class _PassThrough(torch.autograd.Function):
    """ModelOpt's ``pass_through_bwd``: the gradient of the result is that of x, and nothing is
    kept."""

    @staticmethod
    def forward(ctx, x: Tensor, *grid) -> Tensor:
        return _on_grid(x, *grid)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient, None, None, None, None


register_quant_backend("asymq", fake_quantize)
