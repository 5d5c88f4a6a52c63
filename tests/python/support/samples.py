"""The one table of inputs that the operator, opcheck, compile and CUDA tests share.

A Sample names a point of the space of inputs, a DynamicSample one of the operators whose ends are
those of x; `build` makes its tensors. SAMPLES is picked by hand, COVERING is generated such that
every pair of values of any two factors occurs in it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Parameterization(NamedTuple):
    """How to call a parameterization, and its parameters for a range from low to high."""

    function: str
    learned: tuple[str, ...]
    fixed: tuple[str, ...]
    link: str
    from_range: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
    full_range: bool = False


def _scale_offset(low, high, k):
    scale = (high - low) / k
    return scale, low / scale.abs().clamp_min(1e-8)


def _beta_gamma(low, high, k):
    beta, gamma = torch.full_like(low, 0.75), torch.full_like(low, 0.625)
    return beta, gamma, low / beta, high / gamma


# What of a link: f, and values of beta and gamma.
LINKS = {
    "sigmoid": (torch.sigmoid, 4.0, 1.25),
    "exp": (torch.exp, -0.25, 0.5),
    "softplus": (torch.nn.functional.softplus, 0.75, -0.5),
    "clamp": (lambda v: v.clamp(0.25, 4), 0.75, 5.0),  # gamma is held at 4
}


def _linked(link, low, high, k):
    f, *values = LINKS[link]
    beta, gamma = (torch.full_like(low, value) for value in values)
    return beta, gamma, low / f(beta), high / f(gamma)


def _kscale_koffset(low, high, k):
    scale, offset = _scale_offset(low, high, k)
    return scale * k, offset / k


def _half(low, high):
    return (high - low) / 2


PARAMETERIZATIONS = {
    "scale_offset": Parameterization(
        "scale_offset", ("scale", "offset"), (), "identity", _scale_offset
    ),
    "min_max": Parameterization(
        "min_max", ("min", "max"), (), "identity", lambda low, high, k: (low.clone(), high.clone())
    ),
    "beta_gamma": Parameterization(
        "beta_gamma", ("beta", "gamma"), ("min", "max"), "identity", _beta_gamma
    ),
    **{
        f"beta_gamma_{link}": Parameterization(
            "beta_gamma", ("beta", "gamma"), ("min", "max"), link, functools.partial(_linked, link)
        )
        for link in LINKS
    },
    "kscale_koffset": Parameterization(
        "kscale_koffset", ("kscale", "koffset"), (), "identity", _kscale_koffset
    ),
    "symmetric_scale": Parameterization(
        "symmetric_scale",
        ("scale",),
        (),
        "identity",
        lambda low, high, k: (_half(low, high) * 2 / k,),
    ),
    "symmetric_max": Parameterization(
        "symmetric_max", ("max",), (), "identity", lambda low, high, k: (_half(low, high),)
    ),
    "symmetric_gamma": Parameterization(
        "symmetric_gamma",
        ("gamma",),
        ("max",),
        "identity",
        lambda low, high, k: (torch.full_like(low, 0.625), _half(low, high) / 0.625),
    ),
    "symmetric_gamma_sigmoid": Parameterization(
        "symmetric_gamma",
        ("gamma",),
        ("max",),
        "sigmoid",
        lambda low, high, k: (torch.full_like(low, 1.25), _half(low, high) / 0.7773),
    ),
}
for _name in [name for name in PARAMETERIZATIONS if name.startswith("symmetric")]:
    PARAMETERIZATIONS[f"{_name}_full_range"] = PARAMETERIZATIONS[_name]._replace(full_range=True)
PARAMETERIZATIONS["symmetric_gamma_softplus"] = PARAMETERIZATIONS["symmetric_gamma"]._replace(
    link="softplus",
    from_range=lambda low, high, k: (torch.full_like(low, 0.75), _half(low, high) / 1.1368),
)

# The factors alone: the ends are those of x.
DYNAMIC = {
    f"dynamic_{name}": row._replace(
        function=f"dynamic_{row.function}",
        fixed=(),
        from_range=lambda low, high, k, row=row: row.from_range(low, high, k)[: len(row.learned)],
    )
    for name, row in PARAMETERIZATIONS.items()
    if row.learned[-1] == "gamma"
}

# (dtype of x, dtype of the ranges)
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float64/float32": (torch.float64, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
}

SIZES = {
    "odd": (3, 5, 7, 9),
    "one": (1, 1, 1, 1),
    "empty": (4, 0, 3, 6),
    "below": (3, 5, 1, 273),  # 2^12 - 1
    "above": (1, 1, 17, 241),  # 2^12 + 1
    "millions": (8, 16, 126, 162),
}


def _blocks(size: int) -> int:
    """A proper divisor: the number of blocks an axis is cut into."""
    return next((size // d for d in (3, 2, 7, 17) if size % d == 0 and size > d), 1)


GRANULARITIES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "zero_d": lambda shape: (),
    "one": lambda shape: (1,),
    "axis0": lambda shape: (shape[0], 1, 1, 1),
    "axis1": lambda shape: (1, shape[1], 1, 1),
    "axis2": lambda shape: (1, 1, shape[2], 1),
    "last": lambda shape: (1, 1, 1, shape[3]),
    "groups": lambda shape: (*shape[:3], _blocks(shape[3])),
    "blocks_last": lambda shape: (1, 1, 1, _blocks(shape[3])),
    "blocks_first": lambda shape: (_blocks(shape[0]), 1, 1, 1),
    "blocks_two": lambda shape: (1, 1, _blocks(shape[2]), _blocks(shape[3])),
    "two_axes": lambda shape: (1, shape[1], 1, shape[3]),
    "element": lambda shape: shape,
}


def _contiguous(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def _sliced(x: Tensor) -> Tensor:
    """A view at an odd address with gaps between its rows."""
    larger = x.new_zeros(*x.shape[:3], x.shape[3] + 4)
    larger[..., 1:-3] = x
    return larger[..., 1:-3]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _expanded(x: Tensor) -> Tensor:
    return x.flatten()[:1].sum().expand(x.shape)


# name: (layout of x, layout of the upstream gradient)
LAYOUTS = {
    "contiguous": (_contiguous, _contiguous),
    "transposed": (_transposed, _transposed),
    "sliced": (_sliced, _contiguous),
    "channels_last": (_channels_last, _contiguous),
    "expanded_gradient": (_contiguous, _expanded),
    "transposed_gradient": (_contiguous, _transposed),
}

RANGES = {
    "straddle": (-1.1, 1.7),
    "tie_offset": (-1.5, 1.5),  # z = -k/2, which is a tie
    "positive": (0.3, 1.9),
    "negative": (-2.3, -0.4),
    "collapsed": (0.7, 0.7),
    "reversed": (0.9, -1.2),
}


def _values(kind: str, x: Tensor, low: float, high: float, k: int) -> Tensor:
    """Normal values; for "extreme" an eighth of them replaced by the awkward ones."""
    if kind == "normal":
        return x
    step = (high - low) / k
    tiny, huge = torch.finfo(x.dtype).smallest_normal, torch.finfo(x.dtype).max
    awkward = [0.0, -0.0, tiny / 4, -tiny / 4, huge, -huge, float("inf"), float("-inf"), low, high]
    awkward += [step * (i + 0.5) for i in (-3, -2, 0, 1)]
    if kind == "nan":
        awkward.append(float("nan"))
    x = x.clone()
    places = x.view(-1)[::8]
    places.copy_(torch.tensor(awkward, dtype=x.dtype).repeat(len(places) // 8 + 1)[: len(places)])
    return x


class Inputs(NamedTuple):
    x: Tensor
    parameters: tuple[Tensor, ...]  # learned, then fixed
    grad: Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    parameterization: str = "min_max"
    dtype: str = "float32"
    granularity: str = "one"
    layout: str = "contiguous"
    size: str = "odd"
    bits: int = 8
    range: str = "straddle"
    values: str = "normal"
    strided_ranges: bool = False

    def __str__(self) -> str:
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return "-".join(str(part) for part in parts if part is not False)

    operator = "_fake_quantize"  # what the public operator calls

    @property
    def spec(self) -> Parameterization:
        return PARAMETERIZATIONS[self.parameterization]

    def build(self, device: torch.device | str = "cpu", requires_grad: bool = True) -> Inputs:
        """The same values on every device."""
        generator = torch.Generator().manual_seed(7)
        dtype, range_dtype = DTYPES[self.dtype]
        shape, k = SIZES[self.size], 2**self.bits - 1
        low, high = RANGES[self.range]
        layout, grad_layout = LAYOUTS[self.layout]

        x = torch.randn(shape, generator=generator).to(dtype)
        x = _values(self.values, x, low, high, k)
        grad = torch.randn(shape, generator=generator).to(dtype)

        range_shape = GRANULARITIES[self.granularity](shape)
        spread = 1 + torch.rand(range_shape, generator=generator).to(range_dtype) / 2
        parameters = self.spec.from_range(low * spread, high * spread, k)

        x = layout(x.to(device)).detach().requires_grad_(requires_grad)
        grad = grad_layout(grad.to(device))
        parameters = [self._place(p.to(device)) for p in parameters]
        for parameter in parameters[: len(self.spec.learned)]:
            parameter.requires_grad_(requires_grad)
        return Inputs(x, tuple(parameters), grad)

    def _place(self, parameter: Tensor) -> Tensor:
        if not self.strided_ranges:
            return parameter
        return torch.stack((parameter, torch.zeros_like(parameter)), dim=-1)[..., 0].detach()

    def keywords(self) -> dict:
        options = {"bits": self.bits}
        options |= {"link": self.spec.link} if self.spec.link != "identity" else {}
        return options | ({"full_range": True} if self.spec.full_range else {})

    @property
    def loose(self) -> bool:
        """Whether functions of two libraries go into the ranges, whose last bits may differ."""
        return self.spec.link not in ("identity", "clamp") and self.dtype == "float64"

    def call(self, module, x: Tensor, *parameters: Tensor, **keywords) -> Tensor:
        """The parameterization's function of `module`: asymq or asymq.reference."""
        function = getattr(module, f"fake_quantize_{self.spec.function}")
        return function(x, *parameters, **self.keywords(), **keywords)

    def dispatcher_arguments(self, x: Tensor, *parameters: Tensor, eps: float = 1e-8) -> tuple:
        """The same call for torch.ops.asymq, where everything is positional."""
        sigmoid, link = ((False,), (self.spec.link,)) if self.spec.fixed else ((), ())
        symmetric = self.spec.function.startswith("symmetric")
        full_range = (self.spec.full_range,) if symmetric else ()
        scale = 0.75
        return (x, *parameters, self.bits, *sigmoid, eps, *full_range, *link, scale)


# How the last axis is cut: the size of a group, and how many factors there are.
DYNAMIC_GRANULARITIES: dict[str, Callable[[int], tuple[int | None, int]]] = {
    "token": lambda size: (None, 1),
    "groups": lambda size: (size // _blocks(size), 1),
    "positions": lambda size: (size // _blocks(size), _blocks(size)),
}

SIGNS = {
    "both": lambda x: x,
    "positive": torch.abs,
    "negative": lambda x: -x.abs(),
    "zeros": lambda x: x * torch.tensor([0.0, 1.0])[torch.arange(x.shape[2]) % 2, None],
}


@dataclasses.dataclass(frozen=True)
class DynamicSample(Sample):
    """Of an operator that takes each group's ends from x. range: the signs of x."""

    parameterization: str = "dynamic_beta_gamma"
    granularity: str = "token"
    range: str = "both"

    operator = "_fake_quantize_dynamic"

    @property
    def spec(self) -> Parameterization:
        return DYNAMIC[self.parameterization]

    def _cut(self) -> tuple[int | None, int]:
        return DYNAMIC_GRANULARITIES[self.granularity](SIZES[self.size][-1])

    def build(self, device: torch.device | str = "cpu", requires_grad: bool = True) -> Inputs:
        generator = torch.Generator().manual_seed(7)
        dtype, factor_dtype = DTYPES[self.dtype]
        shape, k = SIZES[self.size], 2**self.bits - 1
        layout, grad_layout = LAYOUTS[self.layout]

        x = SIGNS[self.range](torch.randn(shape, generator=generator)).to(dtype)
        x = _values(self.values, x, -1.1, 1.7, k)
        grad = torch.randn(shape, generator=generator).to(dtype)
        count = self._cut()[1]
        spread = 1 + torch.rand(count, generator=generator).to(factor_dtype) / 2
        factors = [p * spread for p in self.spec.from_range(-spread, spread, k)]

        x = layout(x.to(device)).detach().requires_grad_(requires_grad)
        parameters = [self._place(p.to(device)).requires_grad_(requires_grad) for p in factors]
        return Inputs(x, tuple(parameters), grad_layout(grad.to(device)))

    def keywords(self) -> dict:
        return super().keywords() | {"group": self._cut()[0]}

    def dispatcher_arguments(self, x: Tensor, *parameters: Tensor, eps: float = 1e-8) -> tuple:
        full_range = (self.spec.full_range,) if len(self.spec.learned) == 1 else ()
        group = self._cut()[0]
        return (x, *parameters, group, self.bits, False, *full_range, eps, self.spec.link, 0.75)

    def static(self, x: Tensor, factors: tuple[Tensor, ...]) -> tuple[Sample, tuple[Tensor, ...]]:
        """The static sample and the parameters of every group that do the same, but that a token's
        symmetric scale is divided by (k-1)/2 where there it is k/2."""
        group = self._cut()[0] or x.shape[-1]
        blocks = x.detach().unflatten(-1, (x.shape[-1] // group, group)).to(factors[0].dtype)
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        ends = (low, high) if len(factors) == 2 else (torch.maximum(-low, high),)
        own = tuple(factor.detach().expand(low.shape).contiguous() for factor in factors)
        name = self.parameterization.removeprefix("dynamic_")
        return Sample(name, self.dtype, bits=self.bits), (*own, *ends)


def covering(factors: dict[str, list]) -> list[dict]:
    """Rows such that every pair of values of every two factors occurs in one of them.

    Greedy: each row starts from a pair that is still missing and takes, factor by factor, the value
    that brings the most missing pairs.
    """
    names = list(factors)

    def pair(a, value_a, b, value_b):
        return (
            (a, value_a, b, value_b)
            if names.index(a) < names.index(b)
            else (b, value_b, a, value_a)
        )

    missing = {
        (a, va, b, vb): None
        for a, b in itertools.combinations(names, 2)
        for va in factors[a]
        for vb in factors[b]
    }
    rows = []
    while missing:
        a, value_a, b, value_b = next(iter(missing))
        row = {a: value_a, b: value_b}
        for name in names:
            if name not in row:
                row[name] = max(
                    factors[name],
                    key=lambda v: sum(pair(name, v, other, row[other]) in missing for other in row),
                )
        for a, b in itertools.combinations(names, 2):
            missing.pop((a, row[a], b, row[b]), None)
        rows.append(row)
    return rows


COVERING = [
    Sample(**row)
    for row in covering(
        {
            "parameterization": list(PARAMETERIZATIONS),
            "dtype": list(DTYPES),
            "granularity": list(GRANULARITIES),
            "layout": list(LAYOUTS),
            "size": list(SIZES),
            "bits": [2, 4, 8, 12, 16],
            "range": list(RANGES),
            "values": ["normal", "extreme"],
            "strided_ranges": [False, True],
        }
    )
] + [
    DynamicSample(**row)
    for row in covering(
        {
            "parameterization": list(DYNAMIC),
            "dtype": list(DTYPES),
            "granularity": list(DYNAMIC_GRANULARITIES),
            "layout": list(LAYOUTS),
            "size": list(SIZES),
            "bits": [2, 4, 8, 12, 16],
            "range": list(SIGNS),
            "values": ["normal", "extreme"],
            "strided_ranges": [False, True],
        }
    )
]

SAMPLES = [
    *(Sample(parameterization=name) for name in PARAMETERIZATIONS),
    *(Sample(dtype=dtype, granularity="last") for dtype in list(DTYPES)[1:]),
    *(Sample(size=size, granularity="axis0", bits=4) for size in ("empty", "one", "below")),
    *(Sample(layout=layout, granularity="two_axes") for layout in ("transposed", "channels_last")),
    Sample(layout="sliced", granularity="groups"),
    Sample(layout="expanded_gradient", granularity="blocks_two", strided_ranges=True),
    Sample(granularity="zero_d", values="extreme"),
    Sample("beta_gamma", "bfloat16", "axis2", values="extreme", bits=12),
    Sample("scale_offset", granularity="element", range="reversed"),
    *(DynamicSample(name, granularity="positions") for name in DYNAMIC),
    *(DynamicSample(dtype=dtype, granularity="groups") for dtype in list(DTYPES)[1:]),
    *(DynamicSample(size=size, bits=4) for size in ("empty", "one", "below")),
    DynamicSample(layout="transposed"),
    DynamicSample("dynamic_symmetric_gamma", layout="sliced", granularity="groups"),
]
