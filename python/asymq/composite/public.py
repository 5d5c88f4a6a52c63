"""What the public operators become: calls of the private ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asymq import reference
from asymq.composite import checks
from asymq.composite.checks import (
    NO_QUANTIZER,
    dtype_name,
    find_parameterization,
    link_number,
    refusal,
)
from asymq.composite.quantizers import Quantizer

_OPS = torch.ops.asymq


def _bound(name: str, values: Sequence) -> dict[str, Any]:
    """The arguments of a call by name, with the schema's defaults: those at the end are left out
    where they have them."""
    arguments = getattr(_OPS, name).default._schema.arguments
    rest = [argument.default_value for argument in arguments[len(values) :]]
    return dict(zip((a.name for a in arguments), (*values, *rest), strict=True))


def _kind(
    name: str, family: str, symmetric: bool, given: dict[str, Any]
) -> tuple[int, int, float, int, float]:
    number = find_parameterization(name, family, symmetric, given.get("full_range", False))
    link = link_number(name, given.get("sigmoid", False), given.get("link", "identity"))
    return number, given["bits"], given["eps"], link, given["gradient_scale"]


def _fake_quantize(traits: checks.Traits) -> tuple[str, Callable]:
    name = f"fake_quantize_{traits.name}"

    def call(*values) -> Tensor:
        given = _bound(name, values)
        tensors = [given[slot] if slot else None for slot in traits.slots]
        kind = _kind(name, traits.family, traits.symmetric, given)
        return _OPS._fake_quantize.default(given["x"], *tensors, *kind)

    return name, call


def _live(name: str, token: bool, names: tuple[str, ...]) -> tuple[str, Callable]:
    def call(*values) -> Tensor:
        given = _bound(name, values)
        first, second = (*(given[factor] for factor in names), None)[:2]
        kind = _kind(name, "beta_gamma", second is None, given)
        factors = first, second, given["group"]
        return _OPS._fake_quantize_dynamic.default(given["x"], *factors, *kind, token)

    return name, call


class _Range(NamedTuple):
    """A quantizer as the public operators have it."""

    parameterization: str
    parameters: Sequence[Tensor]
    bits: int
    symmetric: bool
    sigmoid: bool
    eps: float
    full_range: bool
    token: bool
    group: int | None
    link: str
    gradient_scale: float

    def by_position(self, op: str, optional: bool) -> Quantizer:
        if optional and self.parameterization == "none":
            return Quantizer([], NO_QUANTIZER, 8, 1.0, 0, 1.0, False, None)
        kind = _kind(op, self.parameterization, self.symmetric, self._asdict())
        return Quantizer(self.parameters, *kind, self.token, self.group)


def _ranges(op: str, values: Sequence, optional: bool = False) -> list:
    """The parts of all quantizers that the values in a row are, as the private operators have
    them."""
    size = len(_Range._fields)
    ranges = [_Range(*values[i : i + size]) for i in range(0, len(values), size)]
    return [part for range_ in ranges for part in range_.by_position(op, optional)]


def _quantized_softmax(scores: Tensor, mask: Tensor | None, causal: bool, *rest) -> Tensor:
    size = 2 * len(_Range._fields)
    window = rest[size] if len(rest) > size else None
    ranges = _ranges("quantized_softmax", rest[:size])
    return _OPS._quantized_softmax.default(scores, mask, causal, window, *ranges)[0]


def _quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    *rest,
) -> Tensor:
    size = 2 * len(_Range._fields)
    window = rest[size] if len(rest) > size else None
    how = mask, causal, window, scaling, *_ranges("quantized_attention", rest[:size])
    return _OPS._quantized_attention.default(query, key, value, *how)[0]


def _quantized_gelu(x: Tensor, *ranges) -> Tensor:
    return _OPS._quantized_gelu.default(x, *_ranges("quantized_gelu", ranges))


def _quantized_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, *rest) -> Tensor:
    range, classes = _with_classes(rest)
    how = *_ranges("quantized_cross_entropy", range), classes, ignore_index
    return _OPS._quantized_cross_entropy.default(logits, labels, *how)[0]


def _with_classes(rest: tuple) -> tuple[tuple, int | None]:
    """A range's parts, and what may be behind them."""
    size = len(_Range._fields)
    return rest[:size], rest[size] if len(rest) > size else None


def _quantized_kl_div(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    ignore_index: int,
    *rest,
) -> Tensor:
    range, classes = _with_classes(rest)
    how = *_ranges("quantized_kl_div", range), temperature, classes, ignore_index
    return _OPS._quantized_kl_div.default(logits, teacher_logits, labels, *how)[0]


def _quantized_rms_norm(x: Tensor, weight: Tensor, eps: float, *ranges) -> Tensor:
    checks.check_positive("quantized_rms_norm", "eps", eps)
    quantizer = _ranges("quantized_rms_norm", ranges, optional=True)
    return _OPS._quantized_rms_norm.default(x, weight, eps, *quantizer)[0]


def _quantized_glu(gate: Tensor, up: Tensor, activation: str, *ranges) -> Tensor:
    names = "silu", "gelu_tanh"
    if activation not in names:
        raise refusal("quantized_glu", f"activation must be silu or gelu_tanh, got {activation}")
    quantizers = _ranges("quantized_glu", ranges, optional=True)
    return _OPS._quantized_glu.default(gate, up, names.index(activation), *quantizers)


def _effective_scale_offset(*values) -> list[Tensor]:
    op = "effective_scale_offset"
    given = _bound(op, values)
    family, symmetric = given["parameterization"], given["symmetric"]
    kind = _kind(op, family, symmetric, given | {"gradient_scale": 1.0})
    quantizer = Quantizer(given["parameters"], *kind, False, None)
    scale, offset = _OPS._effective_scale_offset.default(*quantizer.granular(op))
    return [scale] if symmetric else [scale, offset]


@torch.no_grad()
def _parameters_of_range(*values) -> list[Tensor]:
    """In float64, and rounded to max's dtype."""
    op = "parameters_of_range"
    given = _bound(op, values)
    kind = _kind(
        *(op, given["parameterization"], given["symmetric"]),
        given | {"eps": 1.0, "gradient_scale": 1.0},
    )
    number, bits, _, link, _ = kind
    traits = checks.TRAITS[number]
    checks.check_kind(op, traits, *kind[1:])
    low, high = given["min"], given["max"]
    checks.check_ends(op, low, high)
    first = _first_values(traits, 2**bits - 1, link, low.double(), high.double())
    return [value.to(high.dtype, copy=True) for value in first]


def _first_values(
    traits: checks.Traits, k: int, link: int, low: Tensor, high: Tensor
) -> tuple[Tensor, ...]:
    """What learns, for the range from low to high. A factor starts where its link is 1, or, with a
    sigmoid, nearly 1 and still learns."""
    factor = {"sigmoid": 4.0, "exp": 0.0, "softplus": math.log(math.e - 1)}
    width = high - low
    if traits.family == "beta_gamma":
        first = torch.full_like(high, factor.get([*reference.LINKS][link], 1.0))
        return (first,) * len(traits.learned)
    if traits.family == "min_max":
        return (high,) if traits.symmetric else (low, high)
    if traits.symmetric:
        return (high / ((k + traits.full_range) / 2),)
    scale = width / k if traits.family == "scale_offset" else width
    return scale, low / scale


def _range_of_extrema(*values) -> tuple[Tensor, Tensor, Tensor]:
    op = "range_of_extrema"
    given = _bound(op, values)
    checks.check_bits(op, given["bits"])
    checks.check_positive(op, "fallback", given["fallback"])
    checks.check_positive(op, "eps", given["eps"])
    low, high = given.pop("min"), given.pop("max")
    checks.check_ends(op, low, high)
    if low.dtype not in (torch.float32, torch.float64):
        raise refusal(op, f"min must be float32 or float64, got {dtype_name(low.dtype)}")
    if given["full_range"] and not given["symmetric"]:
        raise refusal(op, "full_range needs symmetric")
    return reference.range_of_extrema(low, high, **given)


def functions() -> dict[str, Callable]:
    """Of every public operator that is not one of the private kind itself."""
    return dict(
        [
            *(_fake_quantize(traits) for traits in checks.TRAITS if not traits.full_range),
            _live("fake_quantize_dynamic_beta_gamma", True, ("beta", "gamma")),
            _live("fake_quantize_dynamic_symmetric_gamma", True, ("gamma",)),
            _live("_fake_quantize_live", False, ("first", "second")),
            ("effective_scale_offset", _effective_scale_offset),
            ("parameters_of_range", _parameters_of_range),
            ("range_of_extrema", _range_of_extrema),
            ("quantized_softmax", _quantized_softmax),
            ("quantized_attention", _quantized_attention),
            ("quantized_gelu", _quantized_gelu),
            ("quantized_cross_entropy", _quantized_cross_entropy),
            ("quantized_kl_div", _quantized_kl_div),
            ("quantized_rms_norm", _quantized_rms_norm),
            ("quantized_glu", _quantized_glu),
        ]
    )
