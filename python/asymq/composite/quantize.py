"""The private operators that quantize and do no more, and those of codes, by `asymq.reference`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asymq import reference
from asymq.composite import checks
from asymq.composite.checks import dtype_name, refusal, traits_of
from asymq.composite.quantizers import Granular, Live

# ---- refusals ----------------------------------------------------------------------------------


def _check_granular(x: Tensor, arguments: Sequence) -> Granular:
    quantizer = Granular(*arguments)
    where = f"fake_quantize_{traits_of(quantizer.parameterization).name}"
    checks.check_granularity(where, x, quantizer.check(where, x))
    return quantizer


def _check_live(x: Tensor, arguments: Sequence) -> Live:
    quantizer = Live(*arguments)
    quantizer.check(f"fake_quantize_dynamic_{traits_of(quantizer.parameterization).name}", x)
    return quantizer


def _check_effective(arguments: Sequence) -> Granular:
    quantizer = Granular(*arguments)
    name = traits_of(quantizer.parameterization).name
    quantizer.check(f"effective_scale_offset: {name}")
    return quantizer


def _check_grad(prefix: str, quantizer: Granular | Live, grad: Tensor, x: Tensor) -> None:
    name = traits_of(quantizer.parameterization).name
    checks.check_grad(f"fake_quantize_{prefix}{name}", "x", grad, x)


def _check_ranges(
    where: str, x: Tensor, scale: Tensor, offset: Tensor | None, full_range: bool, wide: bool
) -> None:
    ranges = [("scale", scale)] + ([] if offset is None else [("offset", offset)])
    checks.check_alike(where, ranges, wide)
    checks.check_granularity(where, x, ranges)
    if offset is not None and full_range:
        raise refusal(
            where, "full_range needs a symmetric grid, which has no offset, got an offset"
        )


def _check_quantize(
    where: str,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    eps: float,
    full_range: bool,
) -> torch.dtype:
    """The codes' dtype."""
    checks.check_bits(where, bits)
    checks.check_positive(where, "eps", eps)
    checks.check_elements(where, "x", x)
    _check_ranges(where, x, scale, offset, full_range, x.dtype == torch.float64)
    return reference.code_dtype(bits, offset is None)


def _check_codes(where: str, codes: Tensor, bits: int, symmetric: bool) -> None:
    expected = reference.code_dtype(bits, symmetric)
    if codes.dtype != expected:
        offset = "without" if symmetric else "with"
        raise refusal(
            where,
            f"codes must be {dtype_name(expected)} for {bits} bits {offset} offset, got "
            f"{dtype_name(codes.dtype)}",
        )


# ---- results -----------------------------------------------------------------------------------


def _in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """In the strides of empty_like(x)."""
    wanted = torch.empty_like(x, dtype=result.dtype)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def _like_ranges(ranges: Tensor, rows: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of ranges in float64 as they are returned."""
    return [
        None if row is None else row.reshape(ranges.shape).to(ranges.dtype).contiguous()
        for row in rows
    ]


def _new(ranges: Tensor, values: Tensor) -> Tensor:
    """Values of a range tensor's kind that are nobody else's."""
    return values.to(ranges.dtype).clone(memory_format=torch.contiguous_format)


def _fake_quantize(x: Tensor, *arguments) -> Tensor:
    quantizer = _check_granular(x, arguments)
    return _in_layout_of(x, reference.quantized(*quantizer.arguments(), x, *quantizer.tensors))


def _fake_quantize_backward(grad: Tensor, x: Tensor, *rest) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    quantizer = _check_granular(x, arguments)
    _check_grad("", quantizer, grad, x)
    learned = len(traits_of(quantizer.parameterization).learned)
    dx, *rows = reference.gradients(
        *(*quantizer.arguments(), quantizer.gradient_scale),
        *(grad, x, quantizer.tensors, needs[: 1 + learned]),
    )
    rows += [None] * (2 - learned)
    dx = None if dx is None else _in_layout_of(x, dx)
    return dx, *_like_ranges(quantizer.first, rows)


def _groups(
    x: Tensor, quantizer: Live
) -> tuple[reference.Groups, tuple[str, int, float, str], list[Tensor]]:
    """The groups of x, and what the functions of `asymq.reference` take of them: what comes before
    the tensors, and the parameters."""
    traits = traits_of(quantizer.parameterization)
    groups = reference.live_groups(
        *(x, quantizer.first, quantizer.group, traits.symmetric, traits.full_range),
        quantizer.token,
    )
    link = [*reference.LINKS][quantizer.link]
    parameters = [*map(groups.spread, quantizer.factors), *groups.ends]
    return groups, (groups.name, 2**quantizer.bits - 1, quantizer.eps, link), parameters


def _fake_quantize_dynamic(x: Tensor, *arguments) -> Tensor:
    quantizer = _check_live(x, arguments)
    groups, before, parameters = _groups(x, quantizer)
    out = reference.quantized(*before, groups.blocks, *parameters)
    return _in_layout_of(x, out.reshape(x.shape))


def _fake_quantize_dynamic_backward(grad: Tensor, x: Tensor, *rest) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    quantizer = _check_live(x, arguments)
    _check_grad("dynamic_", quantizer, grad, x)
    groups, before, parameters = _groups(x, quantizer)
    dx, *rows = reference.gradients(
        *(*before, quantizer.gradient_scale, grad.reshape(groups.blocks.shape), groups.blocks),
        *(parameters, needs[: 1 + len(quantizer.factors)]),
    )
    rows = [None if row is None else row.sum_to_size(groups.view) for row in rows]
    rows += [None] * (2 - len(rows))
    dx = None if dx is None else _in_layout_of(x, dx.reshape(x.shape))
    return dx, *_like_ranges(quantizer.first, rows)


def _effective_scale_offset(*arguments) -> tuple[Tensor, Tensor]:
    quantizer = _check_effective(arguments)
    scale, offset, _ = reference.effective_grid(*quantizer.arguments(), *quantizer.tensors)
    offset = torch.zeros_like(scale) if offset is None else offset
    return _new(quantizer.first, scale), _new(quantizer.first, offset)


def _quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, bits: int, eps=1e-8, full_range=False
) -> Tensor:
    _check_quantize("quantize", x, scale, offset, bits, eps, full_range)
    codes = reference.quantize(x, scale, offset, bits=bits, eps=eps, full_range=full_range)
    return _in_layout_of(x, codes)


def _check_update(
    codes: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    eps: float,
    full_range: bool,
) -> None:
    where = "update_codes_"
    _check_quantize(where, x, scale, offset, bits, eps, full_range)
    _check_codes(where, codes, bits, offset is None)
    if codes.shape != x.shape:
        raise refusal(where, f"codes must have x's shape {list(x.shape)}, got {list(codes.shape)}")
    checks.check_device(where, "codes", codes, "x's", x)


def _update_codes_(
    codes: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    eps: float = 1e-8,
    full_range: bool = False,
) -> Tensor:
    _check_update(codes, x, scale, offset, bits, eps, full_range)
    return reference.update_codes_(
        codes, x, scale, offset, bits=bits, eps=eps, full_range=full_range
    )


def _check_dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor | None, bits: int, eps: float, full_range: bool
) -> None:
    where = "dequantize"
    checks.check_bits(where, bits)
    checks.check_positive(where, "eps", eps)
    _check_codes(where, codes, bits, offset is None)
    _check_ranges(where, codes, scale, offset, full_range, wide=True)


def _dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor | None, bits: int, eps=1e-8, full_range=False
) -> Tensor:
    _check_dequantize(codes, scale, offset, bits, eps, full_range)
    values = reference.dequantize(codes, scale, offset, bits=bits, eps=eps, full_range=full_range)
    return _in_layout_of(codes, values)


KERNELS: dict[str, Callable] = {
    "_fake_quantize": _fake_quantize,
    "_fake_quantize_backward": _fake_quantize_backward,
    "_fake_quantize_dynamic": _fake_quantize_dynamic,
    "_fake_quantize_dynamic_backward": _fake_quantize_dynamic_backward,
    "_effective_scale_offset": _effective_scale_offset,
    "quantize": _quantize,
    "update_codes_": _update_codes_,
    "dequantize": _dequantize,
}


# ---- shapes, for tracing -----------------------------------------------------------------------


def _empty(needed: bool, ranges: Tensor) -> Tensor | None:
    return ranges.new_empty(ranges.shape) if needed else None


def _quantized_shape(x: Tensor, *arguments) -> Tensor:
    _check_granular(x, arguments)
    return torch.empty_like(x)


def _gradient_shapes(grad: Tensor, x: Tensor, *rest) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    quantizer = _check_granular(x, arguments)
    _check_grad("", quantizer, grad, x)
    dx = torch.empty_like(x) if needs[0] else None
    return dx, *(_empty(needed, quantizer.first) for needed in needs[1:])


def _live_shape(x: Tensor, *arguments) -> Tensor:
    _check_live(x, arguments)
    return torch.empty_like(x)


def _live_gradient_shapes(grad: Tensor, x: Tensor, *rest) -> tuple[Tensor | None, ...]:
    *arguments, needs = rest
    quantizer = _check_live(x, arguments)
    _check_grad("dynamic_", quantizer, grad, x)
    dx = torch.empty_like(x) if needs[0] else None
    return dx, *(_empty(needed, quantizer.first) for needed in needs[1:])


def _effective_shapes(*arguments) -> tuple[Tensor, Tensor]:
    first = _check_effective(arguments).first
    return first.new_empty(first.shape), first.new_empty(first.shape)


def _codes_shape(
    x: Tensor, scale: Tensor, offset: Tensor | None, bits: int, eps=1e-8, full_range=False
) -> Tensor:
    dtype = _check_quantize("quantize", x, scale, offset, bits, eps, full_range)
    return torch.empty_like(x, dtype=dtype)


def _changed_shape(
    codes: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    eps: float = 1e-8,
    full_range: bool = False,
) -> Tensor:
    _check_update(codes, x, scale, offset, bits, eps, full_range)
    return x.new_empty((), dtype=torch.int64)


def _values_shape(
    codes: Tensor, scale: Tensor, offset: Tensor | None, bits: int, eps=1e-8, full_range=False
) -> Tensor:
    _check_dequantize(codes, scale, offset, bits, eps, full_range)
    return torch.empty_like(codes, dtype=scale.dtype)


SHAPES: dict[str, Callable] = {
    "_fake_quantize": _quantized_shape,
    "_fake_quantize_backward": _gradient_shapes,
    "_fake_quantize_dynamic": _live_shape,
    "_fake_quantize_dynamic_backward": _live_gradient_shapes,
    "_effective_scale_offset": _effective_shapes,
    "quantize": _codes_shape,
    "update_codes_": _changed_shape,
    "dequantize": _values_shape,
}
