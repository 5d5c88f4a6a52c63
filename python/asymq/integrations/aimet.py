"""A quantization backend of aimet-torch, `aimet_torch.quantization.set_backend("asymq")`.

Imported by itself where asymq and aimet_torch are. This module is the backend: its functions have
the arguments of AIMET's own, and AIMET's offset o, of x̂ = s·(clip(rint(x/s) - o, qmin, qmax) + o),
is this package's less qmin. As AIMET's Triton backend does, it leaves to the torch backend what it
has no kernel for, and all that is wrong, for AIMET's own words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from aimet_torch.experimental import pgs
from aimet_torch.quantization.affine.backends import add_backend, torch_builtins
from torch import Tensor

from asymq import ops

# Only against 0: AIMET has a least scale of its own.
_EPS = torch.finfo(torch.float32).tiny

# One sum and one product, and the gradients of both: nothing to gain.
dequantize = torch_builtins.dequantize


def quantize_dequantize(
    tensor: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float = 0.0,
) -> Tensor:
    """fake_quantize_scale_offset, with its gradients to all three tensors.

    To the torch backend goes what has a shift of the zero point, spiked gradients
    (`aimet_torch.experimental.pgs`), or no grid of :func:`_grid_of`.
    """
    shifted = zero_point_shift != 0.0 or (tensor.requires_grad and pgs.is_pgs_enabled())
    grid = None if shifted else _grid_of(tensor, scale, offset, qmin, qmax, block_size)
    if grid is None:
        return torch_builtins.quantize_dequantize(
            tensor, scale, offset, qmin, qmax, block_size, zero_point_shift
        )
    return ops.fake_quantize_scale_offset(tensor, grid.scale, grid.offset, bits=grid.bits, eps=_EPS)


def quantize(
    tensor: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """The codes, qmin to qmax, in tensor's dtype; NaN gives qmin.

    To the torch backend goes what needs a gradient, codes that tensor's dtype does not hold, which
    it refuses, and what has no grid of :func:`_grid_of`.
    """
    learns = tensor.requires_grad or scale.requires_grad or offset.requires_grad
    grid = _grid_of(tensor, scale, offset, qmin, qmax, block_size)
    if (
        grid is None
        or (learns and torch.is_grad_enabled())
        or max(-qmin, qmax) > 2 / torch.finfo(tensor.dtype).eps
    ):
        return torch_builtins.quantize(tensor, scale, offset, qmin, qmax, block_size)
    codes = ops.quantize(tensor, grid.scale, grid.offset, bits=grid.bits, eps=_EPS)
    return codes.float().add_(qmin).to(tensor.dtype)  # float32 holds 16 bits


class _Grid(NamedTuple):
    scale: Tensor
    offset: Tensor
    bits: int


def _grid_of(
    tensor: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None,
) -> _Grid | None:
    """This package's scale and offset of AIMET's arguments; None where the operators do not take
    them: steps that are not 2**bits - 1 of 2 to 16 bits, scale and offset of two shapes or that do
    not fit the tensor's, another dtype, several devices, another rounding than torch's.
    """
    bits = int(qmax - qmin).bit_length()
    if (
        not 2 <= bits <= 16
        or qmax - qmin != 2**bits - 1
        or tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        or not tensor.device == scale.device == offset.device
        or scale.shape != offset.shape
        or not _fits(tensor.shape, scale.shape, block_size)
        or torch_builtins._round_fn is not torch.round
    ):
        return None
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    shape = (1,) * (tensor.dim() - scale.dim()) + scale.shape
    start = offset.to(dtype) + qmin
    return _Grid(scale.to(dtype).reshape(shape), start.reshape(shape), bits)


def _fits(of: torch.Size, shape: torch.Size, block_size: Sequence[int] | None) -> bool:
    """Whether a scale of this shape expands to a tensor `of` that, or divides it into the blocks
    (-1: whatever is left).
    """
    if len(shape) > len(of):
        return False
    sizes = list(zip(of[len(of) - len(shape) :], shape, strict=True))
    if not block_size:
        return all(count in (1, size) for size, count in sizes)
    return len(block_size) == len(shape) and all(
        size % count == 0 if block == -1 else size == block * count
        for (size, count), block in zip(sizes, block_size, strict=True)
    )


add_backend("asymq", sys.modules[__name__])
