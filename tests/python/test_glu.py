"""The quantized gated linear unit against the composition of our own operators and torch's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from fused import (
    assert_compiles,
    assert_no_second_derivative,
    assert_range_gradient,
    assert_repeatable,
    assert_same_codes,
    assert_transforms_say_so,
    assert_wanted_gradients_alone,
    close,
    fake_quantize,
    flat,
    learned,
    moved,
    opcheck_private,
    quantizer,
)
from samples import DYNAMIC, PARAMETERIZATIONS
from torch import Tensor
from torch.nn import functional as F

from asymq.ops import RangeArguments, quantized_glu

pytestmark = pytest.mark.composite

# Narrower than what comes, so that some is clipped: of gate, activation, up and product.
ENDS = (-2.6, 2.2), (-0.16, 1.8), (-2.4, 2.5), (-2.9, 3.3)
SITES = ("gate", "activation", "up", "product")
# On CUDA the first two have a kernel.
TOKEN = (None, None, None, "dynamic_beta_gamma")
PRODUCT = (None, None, None, "min_max")
STORED = ("min_max", "beta_gamma", "scale_offset", "min_max")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (5, 7, 48)
    dtype: torch.dtype = torch.float32
    # Rows of samples.PARAMETERIZATIONS or DYNAMIC.
    sites: tuple[str | None, ...] = TOKEN
    activation: str = "silu"
    group: int | None = None
    layout: str = "dense"
    range_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape))
        sites = "+".join(map(str, self.sites))
        return "-".join([shape, dtype, sites, self.activation, str(self.group), self.layout])


def with_site(place: int, name: str) -> tuple[str | None, ...]:
    return tuple(name if i == place else None for i in range(4))


CASES = [
    # Rows of less than a vector, of a few lanes, of a warp, of blocks with two and four vectors a
    # thread, with threads that have none, and of more than one round; more rows than teams.
    *(
        Case(shape=shape, sites=sites)
        for shape in (
            (3,),
            (4, 7),
            (9, 4),
            (5, 20),
            (700, 128),
            (3, 132),
            (900, 1000),
            (3, 2056),
            (2, 8192),
            (2, 8200),
            (2, 20000),
        )
        for sites in (TOKEN, PRODUCT)
    ),
    *(
        Case(dtype=dtype, shape=shape, sites=sites, activation=activation)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for shape in ((3, 7), (40, 2048))
        for sites, activation in ((TOKEN, "silu"), (PRODUCT, "gelu_tanh"), (STORED, "silu"))
    ),
    *(Case(sites=sites, activation="gelu_tanh") for sites in (TOKEN, STORED)),
    Case(dtype=torch.float64, range_dtype=torch.float64, sites=STORED),
    Case(sites=(None,) * 4),
    # Every site alone, of any kind.
    *(Case(sites=with_site(place, "min_max")) for place in range(3)),
    *(Case(sites=with_site(place, "dynamic_beta_gamma")) for place in range(3)),
    *(Case(sites=with_site(3, name)) for name in (*PARAMETERIZATIONS, *DYNAMIC)),
    *(Case(group=group) for group in (16, 48)),
    *(
        Case(layout=layout, sites=sites)
        for layout in ("transposed", "offset", "chunked", "expanded")
        for sites in (TOKEN, STORED)
    ),
]


def inputs(case: Case, device):
    count = torch.Size(case.shape).numel()
    if case.layout == "transposed":
        pair = torch.randn(2, *case.shape[::-1], device=device).permute(0, 3, 2, 1).unbind()
    elif case.layout == "offset":
        pair = torch.randn(2 * count + 1, device=device)[1:].view(2, *case.shape).unbind()
    elif case.layout == "chunked":  # as of one layer that gives both
        both = torch.randn(*case.shape[:-1], 2 * case.shape[-1], device=device)
        pair = both.chunk(2, dim=-1)
    elif case.layout == "expanded":
        pair = torch.randn(2, 1, *case.shape[1:], device=device).expand(2, *case.shape).unbind()
    else:
        pair = (2 * torch.randn(2, *case.shape, device=device)).unbind()
    gate, up = (t.to(case.dtype).detach().requires_grad_() for t in pair)
    ranges: list[RangeArguments | None] = []
    for name, ends in zip(case.sites, ENDS, strict=True):
        made = None
        if name is not None:
            made = quantizer(name, *ends, case.range_dtype, device)
            made = made._replace(group=case.group if made.token else None)
        ranges.append(made)
    return gate, up, ranges


def fused(case: Case, gate: Tensor, up: Tensor, ranges) -> Tensor:
    named = {f"{site}_range": r for site, r in zip(SITES[:3], ranges[:3], strict=True)}
    return quantized_glu(gate, up, ranges[3], activation=case.activation, **named)


def compose(case: Case, gate: Tensor, up: Tensor, ranges):
    """Of single operations: the result, and what comes to each quantizer."""

    def quantize(place, x):
        return x if ranges[place] is None else fake_quantize(x, case.sites[place], ranges[place])

    gated = quantize(0, gate)
    activated = F.silu(gated) if case.activation == "silu" else F.gelu(gated, approximate="tanh")
    product = quantize(1, activated) * quantize(2, up)
    return quantize(3, product), (gate, activated, up, product)


def leaves(case: Case, gate: Tensor, up: Tensor, ranges) -> list[Tensor]:
    pairs = zip(case.sites, ranges, strict=True)
    return [gate, up, *(t for name, r in pairs if r is not None for t in learned(name, r))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, device):
    gate, up, ranges = inputs(case, device)
    actual = fused(case, gate, up, ranges)
    assert actual.dtype == case.dtype and actual.shape == gate.shape and actual.is_contiguous()
    expected, (*_, raw) = compose(case, gate, up, ranges)
    assert_same_codes(actual, expected, raw)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, device):
    gate, up, ranges = inputs(case, device)
    grad = torch.randn(case.shape, device=device).to(case.dtype)
    of = leaves(case, gate, up, ranges)
    actual = torch.autograd.grad(fused(case, gate, up, ranges), of, grad)
    out, steps = compose(case, gate, up, ranges)
    expected = torch.autograd.grad(out, of, grad)
    half = case.dtype in (torch.bfloat16, torch.float16)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        close(a, e, 3e-2 if half else 1e-5)
    # No gradient within is larger than the upstream one times what the other factor can be.
    largest = 1 + max(step.detach().double().abs().max() for step in steps)
    terms = grad.double().abs().sum() * largest * (2000 if half else 1)
    for a, e in zip(actual[2:], expected[2:], strict=True):
        assert_range_gradient(a, e, terms)


@pytest.mark.parametrize("sites", [TOKEN, PRODUCT, STORED], ids=str)
def test_not_finite(sites, device):
    """As the composition; of each token's range, a NaN or an infinity stays in its row."""
    case = Case(shape=(4, 64), sites=sites)
    gate, up, ranges = inputs(case, device)
    with torch.no_grad():
        gate[0, 3], up[2, 5], gate[3, 1], gate[3, 2] = torch.nan, torch.inf, 3e38, -3e38
    actual, (expected, _) = fused(case, gate, up, ranges), compose(case, gate, up, ranges)
    assert actual[0].isnan().any() and actual[1].isfinite().all()
    torch.testing.assert_close(actual, expected, equal_nan=True)
    of = [gate, up]
    pairs = zip(*(torch.autograd.grad(y[1].sum(), of) for y in (actual, expected)), strict=True)
    for a, e in pairs:
        torch.testing.assert_close(a[1], e[1])


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("sites", [TOKEN, PRODUCT, STORED], ids=str)
def test_empty(shape, sites, device):
    case = Case(shape=shape, sites=sites)
    gate, up, ranges = inputs(case, device)
    out = fused(case, gate, up, ranges)
    assert out.shape == shape
    gradients = torch.autograd.grad(out.sum(), leaves(case, gate, up, ranges))
    assert all(g.sum() == 0 for g in gradients)


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("sites", [TOKEN, STORED], ids=str)
def test_wanted_gradients_alone(sites, wanted, device):
    """Any of gate, up and the ranges may be frozen."""
    case = Case(sites=sites)
    gate, up, ranges = inputs(case, device)
    learned_tensors = leaves(case, gate, up, ranges)[2:]
    groups = ([gate], [up], learned_tensors)
    assert_wanted_gradients_alone(lambda: fused(case, gate, up, ranges), groups, wanted)


@pytest.mark.native
@pytest.mark.parametrize("sites", [TOKEN, PRODUCT, STORED], ids=str)
def test_repeatable(sites, device):
    case = Case(shape=(1000, 1024), sites=sites)
    gate, up, ranges = inputs(case, device)
    assert_repeatable(lambda: fused(case, gate, up, ranges), leaves(case, gate, up, ranges))


@pytest.mark.parametrize(
    "case",
    [Case(), Case(sites=STORED), Case(sites=STORED, layout="transposed"), Case(group=16)],
    ids=str,
)
def test_opcheck(case, device):
    gate, up, ranges = inputs(case, device)
    public = (gate, up, case.activation, *(part for r in ranges for part in flat(r)))
    torch.library.opcheck(torch.ops.asymq.quantized_glu.default, public)
    opcheck_private(
        lambda: fused(case, gate, up, ranges),
        ["_quantized_glu.default", "_quantized_glu_backward.default"],
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic, device):
    case = Case(sites=(*STORED[:3], "dynamic_beta_gamma"))
    gate, up, ranges = inputs(case, device)
    assert_compiles(
        lambda gate: fused(case, gate, up, ranges).clone(),
        leaves(case, gate, up, ranges),
        backend,
        dynamic,
    )


def test_second_derivative_raises(device):
    gate, up, ranges = inputs(Case(), device)
    assert_no_second_derivative(fused(Case(), gate, up, ranges), gate, "_quantized_glu_backward")


def test_transforms_say_so(device):
    gate, up, ranges = inputs(Case(), device)
    up = up.detach()
    assert_transforms_say_so(lambda x: fused(Case(), x, up, ranges), gate, "quantized_glu")


def test_errors(device):
    gate, up, ranges = inputs(Case(sites=STORED), device)
    of_gate, of_activation, _, of_product = ranges
    two = of_gate._replace(parameters=tuple(t.detach().expand(2) for t in of_gate.parameters))
    for message, call in (
        ("gate must be float32", (gate.long(), up.long(), ranges)),
        (r"up must have gate's shape \[5, 7, 48\], got \[7, 48\]", (gate, up[0], ranges)),
        ("up must be Float .* like gate, got Double", (gate, up.double(), ranges)),
        ("gate's min_max: min must have one element", (gate, up, [two, None, None, None])),
        ("up's min_max: min must have one element", (gate, up, [None, None, two, None])),
        (
            "activation's beta_gamma: bits must be between 2",
            (gate, up, [None, of_activation._replace(bits=1), None, None]),
        ),
        (
            "product's min_max: a live range needs factors",
            (gate, up, [None, None, None, of_product._replace(token=True)]),
        ),
    ):
        with pytest.raises(RuntimeError, match="asymq::quantized_glu: .*" + message):
            fused(Case(), *call)
    with pytest.raises(RuntimeError, match="activation must be silu or gelu_tanh, got relu"):
        quantized_glu(gate, up, None, activation="relu")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sites", [TOKEN, PRODUCT, STORED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype, sites):
    case = Case(shape=(300, 1024), dtype=dtype, sites=sites)
    gate, up, ranges = inputs(case, torch.device("cpu"))
    on_gpu = [t.detach().cuda().requires_grad_() for t in (gate, up)]
    ranges_on_gpu = [None if r is None else moved(r, "cuda") for r in ranges]

    def step(gate, up, ranges):
        out = fused(case, gate, up, ranges)
        of = leaves(case, gate, up, ranges)
        return out, *torch.autograd.grad(out.sum(), of)

    gpu, cpu = step(*on_gpu, ranges_on_gpu), step(gate, up, ranges)
    assert_same_codes(gpu[0].cpu(), cpu[0], cpu[0])
    for a, e in zip(gpu[1:], cpu[1:], strict=True):
        close(a.cpu(), e, 3e-2 if dtype == torch.bfloat16 else 1e-3)
