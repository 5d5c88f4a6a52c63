"""Comparisons that accept what the definition accepts and nothing else."""

from __future__ import annotations

import torch
from samples import DynamicSample
from torch import Tensor


def assert_bit_equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits; all NaNs are one value, the signs of zeros count."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{actual.shape} instead of {expected.shape}"
    actual, expected = actual.detach(), expected.detach().to(actual.device)
    same = (actual == expected) & (actual.signbit() == expected.signbit())
    same |= actual.isnan() & expected.isnan()
    if not same.all():
        where = (~same).nonzero()
        first = tuple(where[0].tolist())
        raise AssertionError(
            f"{len(where)} of {same.numel()} differ, first at {first}: "
            f"{actual[first].item()!r} instead of {expected[first].item()!r}"
        )


def assert_on_grid(
    actual: Tensor, expected: Tensor, quotient: Tensor, scale: Tensor, *, ulps: int = 2
) -> None:
    """Fake-quantized values of float32 arithmetic against exact ones.

    They agree to 1e-6, or differ by one step where the exact quotient x/s (float64) lies within
    `ulps` float32 ulp of a rounding tie. More than one such flip in a thousand is not chance.
    """
    actual, expected, scale = actual.double(), expected.double(), scale.double()
    difference = (actual - expected).abs()
    off = ~(difference <= 1e-6 * expected.abs())
    off &= ~(actual.isnan() & expected.isnan())

    magnitude = quotient.abs().clamp_min(torch.finfo(torch.float32).smallest_normal)
    ulp = torch.exp2(torch.floor(torch.log2(magnitude))) * torch.finfo(torch.float32).eps
    to_tie = (quotient - quotient.floor() - 0.5).abs()
    one_step = (difference - scale).abs() <= 1e-6 * torch.maximum(scale, expected.abs())
    unexplained = off & ~(one_step & (to_tie <= ulps * ulp))
    if unexplained.any():
        first = tuple(unexplained.nonzero()[0].tolist())
        raise AssertionError(
            f"{unexplained.sum().item()} of {off.numel()} differ away from a tie, first at "
            f"{first}: {actual[first].item()!r} instead of {expected[first].item()!r}, "
            f"quotient {quotient[first].item()!r}"
        )
    allowed = max(1, off.numel() // 1000)
    assert off.sum() <= allowed, f"{off.sum().item()} flips on ties, {allowed} would be chance"


def assert_sums(actual: Tensor, expected: Tensor, terms: Tensor, *, exact: bool = False) -> None:
    """Gradients of ranges: within 1e-6 of `terms`, the sums of |terms|, and one rounding of the
    result. exact: float64 throughout, within 1e-12."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{actual.shape} instead of {expected.shape}"
    rounding = torch.finfo(actual.dtype).eps
    smallest = torch.finfo(actual.dtype).smallest_normal
    actual, expected, terms = actual.double(), expected.double(), terms.double()
    tolerance = (1e-12 if exact else 1e-6) * terms + rounding * expected.abs() + smallest
    same = (actual - expected).abs() <= tolerance
    same |= actual == expected  # infinities
    same |= actual.isnan() & expected.isnan()
    if not same.all():
        first = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{(~same).sum().item()} of {same.numel()} sums are off, first at {first}: "
            f"{actual[first].item()!r} instead of {expected[first].item()!r}, "
            f"tolerance {tolerance[first].item()!r}"
        )


def spread(ranges: Tensor, shape: torch.Size) -> Tensor:
    """Gives every element of `shape` a range of its own, with the values of `ranges`."""
    if ranges.numel() == 1:
        return ranges.reshape(()).expand(shape).clone()
    for axis, size in enumerate(shape):
        ranges = ranges.repeat_interleave(size // max(ranges.shape[axis], 1), axis)
    return ranges


def gather(values: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of `spread`: float64 sums of `values` per range of the given shape."""
    values = values.double()
    if shape.numel() == 1:
        return values.sum().reshape(shape)
    for axis, blocks in enumerate(shape):
        values = values.unflatten(axis, (blocks, values.shape[axis] // max(blocks, 1)))
        values = values.sum(axis + 1)
    return values


def term_sizes(sample, module, x: Tensor, parameters: tuple[Tensor, ...], grad: Tensor):
    """Σ|terms| of every learned parameter's gradient, in that parameter's shape.

    With a range of its own for every element, each "sum" that `module` returns is one term.
    """
    if isinstance(sample, DynamicSample):
        static, of_groups = sample.static(x, parameters)
        sizes = term_sizes(static, module, x, of_groups, grad)
        return [
            (size.sum() if p.numel() == 1 else size.flatten(0, -2).sum(0)).reshape(p.shape)
            for size, p in zip(sizes, parameters, strict=True)
        ]
    learned = len(sample.spec.learned)
    own = [spread(p.detach(), x.shape) for p in parameters]
    for parameter in own[:learned]:
        parameter.requires_grad_()
    terms = torch.autograd.grad(sample.call(module, x.detach(), *own), own[:learned], grad)
    return [gather(term.abs(), p.shape) for term, p in zip(terms, parameters, strict=False)]
