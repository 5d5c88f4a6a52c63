"""The quantizer in plain PyTorch: the executable specification of the operators.

Same names, signatures and results as the operators, on any device, readable top to bottom. It is
the oracle of the tests, the baseline of the benchmarks and the definition to look things up in.
"Paper" is "How to Parameterize Asymmetric Quantization Ranges for Quantization-Aware Training".

With b bits and k = 2^b - 1, a grid has the scale s and the real-valued offset z, and

    r = rint(x / s)    n = rint(z)    p = n + k    x̂ = s * clip(r, n, p)           (paper, eq. 1)

A symmetric grid has no offset, n = -(k - 1)/2 and p = (k - 1)/2; in full range n = -(k + 1)/2. The
paper's offset is the negative of torch's zero point: zero_point = -rint(z) with quant_min = 0 and
quant_max = k.

The gradient is the straight-through one, d rint(u)/du = 1. With the regions below (r < n), inside
(n <= r <= p) and above (r > p), dL/dx is the upstream gradient g inside and 0 elsewhere, and every
range parameter's gradient is a linear map of three sums over the elements that share the range:

    G_in = Σ_inside g * (r - x/s)      G_lo = Σ_below g      G_up = Σ_above g

A parameterization is therefore two functions, parameters -> (s, z) and sums -> gradients: one class
below and one entry of PARAMETERIZATIONS. Where it has factors, they are what a link makes of the
learned values. The paper's Table 1 mixes three conventions; the rows here are the derivatives of
its eq. 1.

Granularity is the shape of the range tensors: one element, or as many dimensions as x, each of size
1, x's size there, or a divisor of it (blocks). Elements compute in float32, float64 for float64 x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The effective grid of a call, in the shape and dtype of its range tensors."""

    scale: Tensor
    offset: Tensor | None  # None: symmetric
    full_range: bool = False  # of a symmetric one


class Sums(NamedTuple):
    """G_in, G_lo and G_up in float64, in the shape of the range tensors."""

    inside: Tensor
    below: Tensor
    above: Tensor


# ---- parameters -> grid, sums -> gradients -----------------------------------------------------


def _divide(a: Tensor, b: float) -> Tensor:
    """a / b correctly rounded: CUDA replaces division by a Python scalar with a reciprocal."""
    return a / torch.full_like(a, b)


def _guard(raw: Tensor, eps: float) -> Tensor:
    """max(raw, eps) that keeps NaN; the gradient passes straight through it, so that a collapsed or
    reversed range stays finite and can recover."""
    least = torch.full_like(raw, eps)
    return torch.where(raw < least, least, raw)


def _asymmetric(scale: Tensor, offset: Tensor) -> Grid:
    """A NaN offset must show in every x̂; no comparison with n would notice it."""
    return Grid(torch.where(offset.isnan(), offset, scale), offset)


def _d_scale(sums: Sums, grid: Grid, k: int) -> Tensor:
    """dL/ds at fixed z: G_in + n G_lo + p G_up (Table 1, first row; Table 3)."""
    n, p = _bounds(grid, k, torch.float64)
    return sums.inside + n * sums.below + p * sums.above


def _d_offset(sums: Sums, grid: Grid) -> Tensor:
    """dL/dz at fixed s: s (G_lo + G_up) (Table 1, second row, which lacks the factor s)."""
    return grid.scale.double() * (sums.below + sums.above)


def _d_ends(sums: Sums, grid: Grid, k: int) -> tuple[Tensor, Tensor]:
    """dL/dθmin and dL/dθmax with ζ = rint(z) - z (Table 1, third and fourth row).

    Composing dL/ds and dL/dz instead is the same on paper only: for a collapsed or reversed range
    the terms cancel and what is left is rounding error.
    """
    assert grid.offset is not None
    offset = grid.offset.double()
    share = (offset.round() - offset) / k
    rounding = sums.inside / k
    return (
        -rounding + (1 - share) * sums.below - share * sums.above,
        rounding + share * sums.below + (1 + share) * sums.above,
    )


class Parameterization:
    """grid(k, eps, *parameters) and gradients(sums, grid, k, *parameters)."""

    grid: ClassVar[Callable[..., Grid]]
    gradients: ClassVar[Callable[..., tuple[Tensor, ...]]]


class ScaleOffset(Parameterization):
    """Learns s and z themselves (LSQ+)."""

    @staticmethod
    def grid(k: int, eps: float, scale: Tensor, offset: Tensor) -> Grid:
        return _asymmetric(_guard(scale, eps), offset)

    @staticmethod
    def gradients(sums: Sums, grid: Grid, k: int, *_: Tensor) -> tuple[Tensor, ...]:
        return _d_scale(sums, grid, k), _d_offset(sums, grid)


class MinMax(Parameterization):
    """Learns the ends: s = (θmax - θmin)/k, z = θmin/s (eq. 1)."""

    @staticmethod
    def grid(k: int, eps: float, low: Tensor, high: Tensor) -> Grid:
        scale = _guard(_divide(high - low, k), eps)
        return _asymmetric(scale, low / scale)

    @staticmethod
    def gradients(sums: Sums, grid: Grid, k: int, *_: Tensor) -> tuple[Tensor, ...]:
        return _d_ends(sums, grid, k)


class BetaGamma(Parameterization):
    """Learns factors of the constant ends: s = (γ θmax - β θmin)/k, z = β θmin/s (eq. 3)."""

    @staticmethod
    def grid(k: int, eps: float, beta: Tensor, gamma: Tensor, low: Tensor, high: Tensor) -> Grid:
        return MinMax.grid(k, eps, beta * low, gamma * high)

    @staticmethod
    def gradients(
        sums: Sums, grid: Grid, k: int, beta: Tensor, gamma: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, ...]:
        """Table 1, last two rows: the rows of the ends times θmin and θmax."""
        d_low, d_high = _d_ends(sums, grid, k)
        return d_low * low.double(), d_high * high.double()


class KScaleKOffset(Parameterization):
    """Learns s' and z' with s = s'/k and z = k z' (eq. 9)."""

    @staticmethod
    def grid(k: int, eps: float, kscale: Tensor, koffset: Tensor) -> Grid:
        return _asymmetric(_guard(_divide(kscale, k), eps), koffset * k)

    @staticmethod
    def gradients(sums: Sums, grid: Grid, k: int, *_: Tensor) -> tuple[Tensor, ...]:
        return _d_scale(sums, grid, k) / k, _d_offset(sums, grid) * k


class SymmetricScale(Parameterization):
    """Learns s (Table 3)."""

    full_range: ClassVar[bool] = False

    @classmethod
    def grid(cls, k: int, eps: float, scale: Tensor) -> Grid:
        return Grid(_guard(scale, eps), None, cls.full_range)

    @staticmethod
    def gradients(sums: Sums, grid: Grid, k: int, *_: Tensor) -> tuple[Tensor, ...]:
        return (_d_scale(sums, grid, k),)


class SymmetricMax(Parameterization):
    """Learns the upper end: s = 2 θmax/k (eq. 10 prints b; Table 3 shows that k is meant), in full
    range 2 θmax/(k + 1)."""

    full_range: ClassVar[bool] = False

    @classmethod
    def half(cls, k: int) -> float:
        """What the end is divided by."""
        return (k + 1) / 2 if cls.full_range else k / 2

    @classmethod
    def grid(cls, k: int, eps: float, high: Tensor) -> Grid:
        return Grid(_guard(_divide(high, cls.half(k)), eps), None, cls.full_range)

    @classmethod
    def gradients(cls, sums: Sums, grid: Grid, k: int, *_: Tensor) -> tuple[Tensor, ...]:
        return (_d_scale(sums, grid, k) / cls.half(k),)


class SymmetricGamma(Parameterization):
    """Learns a factor of the constant upper end: s = 2 γ θmax/k (Table 3)."""

    end: ClassVar[type[SymmetricMax]] = SymmetricMax

    @classmethod
    def grid(cls, k: int, eps: float, gamma: Tensor, high: Tensor) -> Grid:
        return cls.end.grid(k, eps, gamma * high)

    @classmethod
    def gradients(
        cls, sums: Sums, grid: Grid, k: int, gamma: Tensor, high: Tensor
    ) -> tuple[Tensor, ...]:
        (d_high,) = cls.end.gradients(sums, grid, k)
        return (d_high * high.double(),)


class SymmetricScaleFullRange(SymmetricScale):
    full_range = True


class SymmetricMaxFullRange(SymmetricMax):
    full_range = True


class SymmetricGammaFullRange(SymmetricGamma):
    end = SymmetricMaxFullRange


class _MaxOnGrid(SymmetricMax):
    """s = θmax/p, so that the end is on the grid."""

    @classmethod
    def half(cls, k: int) -> float:
        return (k - 1) / 2


class TokenGamma(SymmetricGamma):
    """SymmetricGamma on the largest element of a token: with k/2 it would be a tie at γ = 1, and
    its gradient would hang on the last bit."""

    end = _MaxOnGrid


PARAMETERIZATIONS: dict[str, type[Parameterization]] = {
    "scale_offset": ScaleOffset,
    "min_max": MinMax,
    "beta_gamma": BetaGamma,
    "kscale_koffset": KScaleKOffset,
    "symmetric_scale": SymmetricScale,
    "symmetric_max": SymmetricMax,
    "symmetric_gamma": SymmetricGamma,
    "symmetric_scale_full_range": SymmetricScaleFullRange,
    "symmetric_max_full_range": SymmetricMaxFullRange,
    "symmetric_gamma_full_range": SymmetricGammaFullRange,
    "token_gamma": TokenGamma,
}

_SYMMETRIC = {
    "scale_offset": "symmetric_scale",
    "min_max": "symmetric_max",
    "beta_gamma": "symmetric_gamma",
}


class Link(NamedTuple):
    """f(v), what a learned factor becomes before it is applied, and f'(v), both in float64."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


LINKS = {
    "identity": Link(lambda v: v, torch.ones_like),
    # As in OmniQuant. σ(1 - σ) would vanish beyond 37.
    "sigmoid": Link(torch.sigmoid, lambda v: v.sigmoid() * (-v).sigmoid()),
    "exp": Link(torch.exp, torch.exp),
    "softplus": Link(lambda v: v.clamp(min=0) + (-v.abs()).exp().log1p(), torch.sigmoid),
    # The gradient passes straight through.
    "clamp": Link(lambda v: v.clamp(1 / 4, 4), torch.ones_like),
}


def apply_link(link: str, learned: Tensor) -> Tensor:
    """f in float64, rounded once: float32 functions differ between libraries."""
    return LINKS[link].value(learned.double()).to(learned.dtype)


def _applied(link: str, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """The parameters as they are applied: every factor has an end, which follows them."""
    if link == "identity":
        return parameters
    half = len(parameters) // 2
    return *(apply_link(link, v) for v in parameters[:half]), *parameters[half:]


# ---- elements ----------------------------------------------------------------------------------


class _Blocks:
    """Views that let ranges of a granularity broadcast over x.

    An axis of x that holds several blocks is split in two, (blocks, block length); splitting never
    copies. `reduced` are the axes of that view along which one range is shared.
    """

    def __init__(self, shape: torch.Size, ranges: torch.Size):
        # Size.numel() would fix sizes that are symbols.
        sizes = [1] * len(shape) if all(n == 1 for n in ranges) else list(ranges)
        if len(sizes) != len(shape) or any(
            b == 0 or n % b for n, b in zip(shape, sizes, strict=True) if b != n
        ):
            raise RuntimeError(
                f"asymq.reference: ranges of shape {list(ranges)} do not divide x's shape "
                f"{list(shape)}"
            )
        self.shape, self.range_shape = shape, ranges
        self.view, self.range_view, self.reduced = [], [], []
        for size, blocks in zip(shape, sizes, strict=True):
            if blocks not in (1, size):
                self.view.append(blocks)
                self.range_view.append(blocks)
                size, blocks = size // blocks, 1
            if blocks != size:
                self.reduced.append(len(self.view))
            self.view.append(size)
            self.range_view.append(blocks)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(self.view)

    def join(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape)

    def spread(self, ranges: Tensor | float, dtype: torch.dtype) -> Tensor | float:
        return ranges.reshape(self.range_view).to(dtype) if torch.is_tensor(ranges) else ranges

    def sum(self, x: Tensor) -> Tensor:
        """Sums per range in float64."""
        if self.reduced:
            x = x.sum(self.reduced, dtype=torch.float64)
        return x.double().reshape(self.range_shape)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bounds(grid: Grid, k: int, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
    """n and p: rint(z) rounds in the parameters' dtype, n + k is computed in `dtype`."""
    if grid.offset is None:
        return -(k - 1) / 2 - grid.full_range, (k - 1) / 2
    # Adding 0 turns -0 into 0: n + 0 and n + k are the values of the codes 0 and k.
    n = grid.offset.round().to(dtype) + 0.0
    return n, n + k


def _elements(x: Tensor, grid: Grid, k: int):
    """Blocks, u = x/s, r = rint(u) half to even, and s, n, p to broadcast against them."""
    dtype = compute_dtype(x.dtype)
    blocks = _Blocks(x.shape, grid.scale.shape)
    scale = blocks.spread(grid.scale, dtype)
    n, p = (blocks.spread(bound, dtype) for bound in _bounds(grid, k, dtype))
    u = blocks.split(x).to(dtype) / scale
    return blocks, u, u.round(), scale, n, p


class _Once(torch.autograd.Function):
    """A first derivative that depends on `others`, of which the second is an error: torch's
    once_differentiable would make it 0 under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, *others):
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("asymq.reference: fake_quantize has no second derivative")


def effective_grid(name: str, k: int, eps: float, link: str, *parameters: Tensor) -> Grid:
    """Of a parameterization, the link of whose factors is ``link``."""
    return PARAMETERIZATIONS[name].grid(k, eps, *_applied(link, parameters))


def quantized(name: str, k: int, eps: float, link: str, x: Tensor, *parameters: Tensor) -> Tensor:
    """x̂ of a parameterization, in x's shape and dtype."""
    grid = effective_grid(name, k, eps, link, *parameters)
    blocks, _, r, scale, n, p = _elements(x, grid, k)
    # Compare and select: NaN counts as inside, and clamp's own gradient plays no part.
    r = torch.where(r < n, n, torch.where(r > p, p, r))
    return blocks.join((scale * r).to(x.dtype))


def gradients(
    name: str,
    k: int,
    eps: float,
    link: str,
    gradient_scale: float,
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dL/dx in x's shape and grad's dtype, then of the learned parameters in float64, in their
    shape; None where ``needs`` says that it is not needed."""
    parameterization = PARAMETERIZATIONS[name]
    applied = _applied(link, parameters)
    grid = parameterization.grid(k, eps, *applied)
    blocks, u, r, _, n, p = _elements(x, grid, k)
    below, above = r < n, r > p
    outside = below | above
    grad = blocks.split(grad)
    result: list[Tensor | None] = [None] * len(needs)
    if needs[0]:
        result[0] = blocks.join(torch.where(outside, 0, grad))
    if any(needs[1:]):
        g = grad.to(u.dtype)
        # Selected, not multiplied by a mask: g outside may be inf or NaN.
        sums = Sums(
            blocks.sum(torch.where(outside, 0, g * (r - u))),
            blocks.sum(torch.where(below, g, 0)),
            blocks.sum(torch.where(above, g, 0)),
        )
        rows = parameterization.gradients(sums, grid, k, *applied)
        for i, (row, parameter) in enumerate(zip(rows, parameters, strict=False), start=1):
            if needs[i]:
                row = LINKS[link].derivative(parameter.double()) * row
                result[i] = gradient_scale * row
    return result


class _FakeQuantize(torch.autograd.Function):
    """In the form that torch.func's transforms see through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, name, k, eps, link, gradient_scale, *parameters):
        return quantized(name, k, eps, link, x, *parameters)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.name, ctx.k, ctx.eps, ctx.link, ctx.gradient_scale, *parameters = inputs
        ctx.save_for_backward(x, *parameters)

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]
        with torch.no_grad():
            of: list[Tensor | None] = [
                None if row is None else row.to(tensor.dtype)
                for row, tensor in zip(
                    gradients(
                        *(ctx.name, ctx.k, ctx.eps, ctx.link, ctx.gradient_scale),
                        *(grad, x, parameters, needs),
                    ),
                    (x, *parameters),
                    strict=True,
                )
            ]
        if not torch.compiler.is_compiling():  # what is compiled is not differentiated again
            of = [None if g is None else _Once.apply(g, grad, x, *parameters) for g in of]
        return of[0], *[None] * 5, *of[1:]


def _fake_quantize(
    name: str,
    x: Tensor,
    bits: int,
    eps: float,
    gradient_scale: float,
    *parameters: Tensor,
    link: str = "identity",
) -> Tensor:
    if not 0 < gradient_scale < float("inf"):
        raise RuntimeError(
            f"asymq.reference: gradient_scale must be positive and finite, got {gradient_scale}"
        )
    return _FakeQuantize.apply(x, name, 2**bits - 1, eps, link, gradient_scale, *parameters)


def _name(name: str, full_range: bool) -> str:
    return name + "_full_range" * full_range


def _link(sigmoid: bool, link: str) -> str:
    """What both arguments ask for."""
    if link not in LINKS:
        raise RuntimeError(f"asymq.reference: link must be one of {', '.join(LINKS)}, got {link!r}")
    if not sigmoid:
        return link
    if link not in ("identity", "sigmoid"):
        raise RuntimeError(
            f"asymq.reference: sigmoid is a link itself: leave it or link={link!r} out"
        )
    return "sigmoid"


# ---- live ranges -------------------------------------------------------------------------------


class Groups(NamedTuple):
    """A call with live ranges as one of static ranges, a range for every group."""

    name: str  # of the parameterization
    blocks: Tensor  # [..., groups of a row, elements of a group]: x
    ends: list[Tensor]  # [..., groups of a row, 1]: the constants
    view: list[int]  # the factors' shape beside the ends, 1 where groups share them

    def spread(self, factor: Tensor) -> Tensor:
        """One for every group."""
        return factor.reshape(self.view).expand(self.ends[0].shape)


def live_groups(
    x: Tensor, factor: Tensor, group: int | None, symmetric: bool, full_range: bool, token: bool
) -> Groups:
    """Constant ends that are the extrema of each group. RuntimeError: a group that does not divide
    x's last axis, factors of a shape that does not fit the groups."""
    if x.dim() == 0 or (group is not None and (group < 1 or x.shape[-1] % group)):
        raise RuntimeError(
            f"asymq.reference: group {group} must divide the last axis of x, whose shape is "
            f"{list(x.shape)}"
        )
    in_row = 1 if group is None else x.shape[-1] // group
    blocks = x.reshape(*x.shape[:-1], in_row, x.shape[-1] if group is None else group)
    shape = (*blocks.shape[:-1], 1)

    with torch.no_grad():
        if x.numel() == 0:
            low = high = blocks.new_zeros(shape)
        else:
            low, high = blocks.aminmax(dim=-1, keepdim=True)
        low, high = low.to(factor.dtype), high.to(factor.dtype)
        # A NaN or infinity shows in its whole group.
        finite = low.isfinite() & high.isfinite()
        low, high = (torch.where(finite, end, torch.nan) for end in (low, high))
        if token:
            low, high = low.clamp(max=0), high.clamp(min=0)
        ends = [torch.maximum(-low, high)] if symmetric else [low, high]

    count = factor.numel()
    if count == 1:
        view = [1] * len(shape)
    elif count == in_row:
        view = [1] * (len(shape) - 2) + [in_row, 1]
    elif not token and count == low.numel():
        view = list(shape)
    else:
        raise RuntimeError(
            f"asymq.reference: factors of shape {list(factor.shape)} do not fit the {in_row} "
            f"groups of a row of x, whose shape is {list(x.shape)}"
        )
    if not symmetric:
        name = "beta_gamma"
    elif token and not full_range:
        name = "token_gamma"
    else:
        name = _name("symmetric_gamma", full_range)
    return Groups(name, blocks, ends, view)


def _live(
    x: Tensor,
    factors: tuple[Tensor, ...],
    group: int | None,
    bits: int,
    symmetric: bool,
    full_range: bool,
    eps: float,
    link: str,
    gradient_scale: float,
    token: bool,
) -> Tensor:
    groups = live_groups(x, factors[0], group, symmetric, full_range, token)
    # Through float64, which changes no value: there the gradients of all groups are summed.
    learned = [groups.spread(f.double()).to(f.dtype) for f in factors]
    tensors = *learned, *groups.ends
    out = _fake_quantize(groups.name, groups.blocks, bits, eps, gradient_scale, *tensors, link=link)
    return out.reshape(x.shape)


def _constant(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise RuntimeError(
                f"asymq.reference: {name} must not require grad: it is a constant of this "
                "parameterization"
            )


# ---- public functions --------------------------------------------------------------------------
#
# x: any shape, float32, float64, bfloat16 or float16. Ranges: float32 (or float64 with float64 x),
# all of one shape that fixes the granularity. Results have x's shape and dtype, the gradients of
# ranges their own. bits: 2 to 16. eps > 0: the least effective scale. RuntimeError: ranges whose
# shape does not fit x's, constants that require grad.


def fake_quantize_scale_offset(
    x, scale, offset, *, bits: int, eps: float = 1e-8, gradient_scale: float = 1.0
) -> Tensor:
    """Learns scale and offset: see ScaleOffset."""
    return _fake_quantize("scale_offset", x, bits, eps, gradient_scale, scale, offset)


def fake_quantize_min_max(
    x, min, max, *, bits: int, eps: float = 1e-8, gradient_scale: float = 1.0
) -> Tensor:
    """Learns both ends of the range: see MinMax."""
    return _fake_quantize("min_max", x, bits, eps, gradient_scale, min, max)


def fake_quantize_beta_gamma(
    x,
    beta,
    gamma,
    min,
    max,
    *,
    bits: int,
    sigmoid: bool = False,
    eps: float = 1e-8,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """Learns factors of the constant ends min and max: see BetaGamma and LINKS."""
    _constant(min=min, max=max)
    link = _link(sigmoid, link)
    parameters = beta, gamma, min, max
    return _fake_quantize("beta_gamma", x, bits, eps, gradient_scale, *parameters, link=link)


def fake_quantize_kscale_koffset(
    x, kscale, koffset, *, bits: int, eps: float = 1e-8, gradient_scale: float = 1.0
) -> Tensor:
    """Learns scale and offset multiplied and divided by k: see KScaleKOffset."""
    return _fake_quantize("kscale_koffset", x, bits, eps, gradient_scale, kscale, koffset)


def fake_quantize_symmetric_scale(
    x,
    scale,
    *,
    bits: int,
    eps: float = 1e-8,
    full_range: bool = False,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Learns the scale of a symmetric grid: see SymmetricScale."""
    name = _name("symmetric_scale", full_range)
    return _fake_quantize(name, x, bits, eps, gradient_scale, scale)


def fake_quantize_symmetric_max(
    x, max, *, bits: int, eps: float = 1e-8, full_range: bool = False, gradient_scale: float = 1.0
) -> Tensor:
    """Learns the upper end of a symmetric grid: see SymmetricMax."""
    return _fake_quantize(_name("symmetric_max", full_range), x, bits, eps, gradient_scale, max)


def fake_quantize_symmetric_gamma(
    x,
    gamma,
    max,
    *,
    bits: int,
    sigmoid: bool = False,
    eps: float = 1e-8,
    full_range: bool = False,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """Learns a factor of the constant upper end max of a symmetric grid: see SymmetricGamma and
    LINKS."""
    _constant(max=max)
    name, link = _name("symmetric_gamma", full_range), _link(sigmoid, link)
    return _fake_quantize(name, x, bits, eps, gradient_scale, gamma, max, link=link)


def fake_quantize_dynamic_beta_gamma(
    x,
    beta,
    gamma,
    *,
    group: int | None = None,
    bits: int,
    sigmoid: bool = False,
    eps: float = 1e-8,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """Learns factors, shared by all tokens, of the ends of each token, or of each `group` of its
    elements, with zero in the range: θmin = min(0, min x), θmax = max(0, max x)."""
    link, factors = _link(sigmoid, link), (beta, gamma)
    return _live(x, factors, group, bits, False, False, eps, link, gradient_scale, token=True)


def fake_quantize_dynamic_symmetric_gamma(
    x,
    gamma,
    *,
    group: int | None = None,
    bits: int,
    sigmoid: bool = False,
    full_range: bool = False,
    eps: float = 1e-8,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """The same with a symmetric grid and θmax = max |x|: see TokenGamma."""
    link = _link(sigmoid, link)
    return _live(x, (gamma,), group, bits, True, full_range, eps, link, gradient_scale, token=True)


def _fake_quantize_live(
    x,
    *factors,
    group: int | None,
    bits: int,
    symmetric: bool = False,
    sigmoid: bool = False,
    full_range: bool = False,
    eps: float = 1e-8,
    link: str = "identity",
    gradient_scale: float = 1.0,
) -> Tensor:
    """A weight's factors, one, one for every group of a row or one for every group, on the extrema
    of its groups as they are."""
    return _live(
        x,
        factors,
        group,
        bits,
        symmetric,
        full_range,
        eps,
        _link(sigmoid, link),
        gradient_scale,
        token=False,
    )


def _grid(scale: Tensor, offset: Tensor | None, k: int, eps: float, full_range: bool) -> Grid:
    if offset is None:
        symmetric = SymmetricScaleFullRange if full_range else SymmetricScale
        return symmetric.grid(k, eps, scale)
    if full_range:
        raise RuntimeError("asymq.reference: full_range needs a symmetric grid, without offset")
    return ScaleOffset.grid(k, eps, scale, offset)


def code_dtype(bits: int, symmetric: bool) -> torch.dtype:
    if symmetric:
        return torch.int8 if bits <= 8 else torch.int16
    return torch.uint8 if bits <= 8 else torch.int32


@torch.no_grad()
def quantize(
    x, scale, offset=None, *, bits: int, eps: float = 1e-8, full_range: bool = False
) -> Tensor:
    """Integer codes of x: clip(r - n, 0, k) (paper, eq. 1), uint8 up to 8 bits, else int32.

    Without offset clip(r, n, p), int8 up to 8 bits, else int16. NaN gives code 0.
    """
    k = 2**bits - 1
    blocks, _, r, _, n, p = _elements(x, _grid(scale, offset, k, eps, full_range), k)
    low, high = (n, p) if offset is None else (0.0, float(k))
    codes = r if offset is None else r - n
    codes = torch.where(codes < low, low, torch.where(codes > high, high, codes))
    codes = torch.where(codes.isnan(), 0.0, codes)
    return blocks.join(codes).to(code_dtype(bits, offset is None))


@torch.no_grad()
def update_codes_(
    codes, x, scale, offset=None, *, bits: int, eps: float = 1e-8, full_range: bool = False
) -> Tensor:
    """Overwrites codes with those of x; returns how many changed, int64 and 0-d.

    RuntimeError: codes of another shape or dtype than quantize gives.
    """
    new = quantize(x, scale, offset, bits=bits, eps=eps, full_range=full_range)
    if (codes.shape, codes.dtype) != (new.shape, new.dtype):
        raise RuntimeError(
            f"asymq.reference: codes must be {new.dtype} of shape {list(new.shape)}, got "
            f"{codes.dtype} of shape {list(codes.shape)}"
        )
    changed = (codes != new).sum()
    codes.copy_(new)
    return changed


@torch.no_grad()
def dequantize(
    codes, scale, offset=None, *, bits: int, eps: float = 1e-8, full_range: bool = False
) -> Tensor:
    """s * (codes + rint(z)) (paper, eq. 1), s * codes without offset, in scale's dtype."""
    grid = _grid(scale, offset, 2**bits - 1, eps, full_range)
    blocks = _Blocks(codes.shape, scale.shape)
    levels = blocks.split(codes).to(scale.dtype)
    if offset is not None:
        levels = levels + blocks.spread(offset.round(), scale.dtype)
    return blocks.join(blocks.spread(grid.scale, scale.dtype) * levels)


@torch.no_grad()
def effective_scale_offset(
    parameterization: str,
    *parameters: Tensor,
    bits: int,
    symmetric: bool = False,
    sigmoid: bool = False,
    eps: float = 1e-8,
    full_range: bool = False,
    link: str = "identity",
) -> tuple[Tensor, Tensor | None]:
    """The guarded scale and the offset (None if symmetric) of any parameterization.

    parameterization: "scale_offset", "min_max", "beta_gamma" or "kscale_koffset"; parameters: those
    of its fake_quantize function, in that order. ValueError: no such combination.
    """
    name = _SYMMETRIC.get(parameterization, "") if symmetric else parameterization
    name, link = _name(name, full_range), _link(sigmoid, link)
    if name not in PARAMETERIZATIONS or (link != "identity" and parameterization != "beta_gamma"):
        raise ValueError(
            f"asymq.reference: no parameterization {parameterization!r} with "
            f"symmetric={symmetric}, link={link!r} and full_range={full_range}"
        )
    grid = effective_grid(name, 2**bits - 1, eps, link, *parameters)
    return grid.scale, grid.offset


@torch.no_grad()
def range_of_extrema(
    min,
    max,
    *,
    bits: int,
    symmetric: bool = False,
    force_zero: bool = True,
    fallback: float = 1.0,
    eps: float = 1e-8,
    full_range: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A range for values from min to max, and where they say nothing of its width.

    min, max: float32 or float64, of one shape. ±fallback where all values are 0; with zero inside
    if force_zero, and where the values do not vary; at least k eps wide, in full range (k + 1) eps,
    or the guard would hold the scale.
    """
    least_width = (2**bits - 1 + full_range) * eps
    if symmetric:
        end = torch.maximum(-min, max)
        empty = end == 0
        end = torch.where(empty, fallback, end)
        wide = torch.clamp(end, min=least_width / 2)
        return -wide, wide, empty | (wide > end)
    constant = max - min <= 1e-6 * torch.maximum(min.abs(), max.abs())
    with_zero = torch.full_like(constant, True) if force_zero else constant
    low = torch.where(with_zero, min.clamp(max=0), min)
    high = torch.where(with_zero, max.clamp(min=0), max)
    empty = low == high
    low = torch.where(empty, -fallback, low)
    high = torch.where(empty, fallback, high)
    wide = torch.maximum(high, low + least_width)
    return low, wide, empty | (wide > high)
