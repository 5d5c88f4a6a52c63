"""The numbers of an export: what a quantizer's grid is, and the integers that hold it.

A *code* is r = clip(rint(x/s), n, p), as `asymq.quantize` finds it; what a file stores of it is
r + its zero point, in a *container*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asymq import ops
from asymq.quantizers import Quantizer, QuantSpec

SIGNED = {"int4": (-8, 7), "int8": (-128, 127), "int16": (-32768, 32767)}
UNSIGNED = {"uint4": (0, 15), "uint8": (0, 255), "uint16": (0, 65535)}
FLOAT = "float32"


class Container(NamedTuple):
    """An integer type and the zero points with which a grid lies within it, int32, of the shape of
    the grid's scale."""

    dtype: str
    zero_point: Tensor

    @property
    def ends(self) -> tuple[int, int]:
        return (SIGNED | UNSIGNED)[self.dtype]


class Grid(NamedTuple):
    """x̂ = scale·clip(rint(x/scale), lowest, highest).

    scale: float32, of the shape of the ranges. lowest, highest: n and p, int64, of the same shape.
    """

    spec: QuantSpec
    scale: Tensor
    offset: Tensor | None  # z; None: symmetric
    lowest: Tensor
    highest: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, quantizer: Quantizer) -> Grid:
        """Of a quantizer with a stored range."""
        spec = quantizer.spec
        scale, offset = quantizer.scale_offset()
        if offset is None:
            lowest, highest = (torch.full_like(scale, end).long() for end in spec.codes)
        else:
            lowest = offset.round().long()
            highest = lowest + spec.steps
        return cls(spec, scale, offset, lowest, highest)

    def codes(self, x: Tensor) -> Tensor:
        """r of every element of x, int32. Ranges must lie on x as they lie on a weight."""
        codes = ops.quantize(
            x.detach(),
            self.scale,
            self.offset,
            bits=self.spec.bits,
            eps=self.spec.eps,
            full_range=self.spec.full_range,
        ).int()
        # Those of asymmetric grids are counted from n.
        return codes if self.offset is None else codes + spread(self.lowest.int(), x.shape)

    def values(self, x: Tensor) -> Tensor:
        """x on the grid, float32."""
        return self.codes(x) * spread(self.scale, x.shape)

    def container(self, constant: bool = False) -> Container | None:
        """The smallest one that holds every code and zero point; None: none does.

        Symmetric grids have the zero point 0, asymmetric ones -n, or 0 where n > 0. constant: of
        data that are known; of others onnxruntime knows no types of 4 bits.
        """
        if self.offset is None:
            types, zero_point = SIGNED, torch.zeros_like(self.lowest)
        else:
            types, zero_point = UNSIGNED, (-self.lowest).clamp_min(0)
        largest = int(torch.maximum(self.highest + zero_point, zero_point).max())
        smallest = int((self.lowest + zero_point).min())
        for dtype, (low, high) in types.items():
            if dtype.endswith("int4") and not constant:
                continue
            if low <= smallest and largest <= high:
                return Container(dtype, zero_point.int())
        return None

    def clip(self, container: Container) -> tuple[Tensor, Tensor] | None:
        """Ends, s·n and s·p in float32, to which an activation must be clipped before it goes into
        the container, so that nothing survives beyond the grid; None: the container's are it."""
        low, high = container.ends
        lowest, highest = self.lowest + container.zero_point, self.highest + container.zero_point
        if bool((lowest == low).all() and (highest == high).all()):
            return None
        return self.scale * self.lowest, self.scale * self.highest


def spread(ranges: Tensor, shape: Sequence[int]) -> Tensor:
    """What belongs to each range for each element of a tensor of `shape`, or one value for all; of
    an axis with one range there stays one."""
    if ranges.numel() == 1:
        return ranges.reshape(())
    for axis, (size, count) in enumerate(zip(shape, ranges.shape, strict=True)):
        if count > 1:
            ranges = ranges.repeat_interleave(size // count, axis)
    return ranges
