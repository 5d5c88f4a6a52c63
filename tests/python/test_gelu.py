"""The quantized GELU against the composition of our own operators and torch's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from compare import assert_on_grid
from fused import (
    assert_compiles,
    assert_no_second_derivative,
    assert_range_gradient,
    assert_repeatable,
    assert_takes_expanded_gradient,
    assert_transforms_say_so,
    assert_wanted_gradients_alone,
    close,
    fake_quantize,
    flat,
    in_layout,
    learned,
    moved,
    opcheck_private,
    quantizer,
    scale_of,
    wide,
)
from samples import PARAMETERIZATIONS
from torch import Tensor
from torch.nn.functional import gelu

from asymq.ops import quantized_gelu

pytestmark = pytest.mark.composite

# Narrower than what comes, so that some is clipped.
INPUT, OUTPUT = (-2.6, 2.2), (-0.16, 1.8)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (5, 7, 33)
    dtype: torch.dtype = torch.float32
    before: str = "min_max"  # rows of samples.PARAMETERIZATIONS
    after: str = "beta_gamma"
    layout: str = "dense"
    range_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape)) or "0d"
        return "-".join([shape, dtype, self.before, self.after, self.layout])


CASES = [
    *(Case(shape=shape) for shape in ((), (1,), (3,), (4, 1000), (2, 3, 64), (400, 1024))),
    *(
        Case(dtype=dtype, shape=shape)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for shape in ((3, 7), (9, 128))
    ),
    Case(dtype=torch.float64, range_dtype=torch.float64),
    *(Case(before=name, after=name) for name in PARAMETERIZATIONS),
    *(Case(layout=layout) for layout in ("transposed", "offset", "sliced", "expanded")),
]


def inputs(case: Case, device):
    x = in_layout(case.layout, case.shape, device)
    x = (2 * x if case.layout in ("dense", "offset") else x).to(case.dtype)
    ranges = (
        quantizer(case.before, *INPUT, case.range_dtype, device),
        quantizer(case.after, *OUTPUT, case.range_dtype, device),
    )
    return x.detach().requires_grad_(), ranges


def compose(case: Case, x: Tensor, ranges):
    """Of single operations in x's dtype: the result, and what is quantized on the way to it."""
    quantized = fake_quantize(x, case.before, ranges[0])
    raw = gelu(quantized, approximate="tanh")
    return fake_quantize(raw, case.after, ranges[1]), quantized, raw


def leaves(case: Case, x: Tensor, ranges) -> list[Tensor]:
    return [x, *learned(case.before, ranges[0]), *learned(case.after, ranges[1])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, device):
    x, ranges = inputs(case, device)
    actual = quantized_gelu(x, *ranges)
    assert actual.dtype == case.dtype and actual.shape == x.shape
    assert actual.stride() == torch.empty_like(x).stride()
    expected, _, raw = compose(case, x.detach().to(wide(case.dtype)), ranges)
    scale = scale_of(ranges[1])
    if case.dtype == wide(case.dtype):
        quotient = raw.double() / scale.double()
        assert_on_grid(actual.detach(), expected.detach(), quotient, scale, ulps=4)
    else:
        flips = (actual != expected.to(case.dtype)).sum().item()
        assert flips <= max(1, actual.numel() // 1000)
        assert (actual.float() - expected.float()).abs().max() <= 1.01 * scale.item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, device):
    x, ranges = inputs(case, device)
    grad = torch.randn(case.shape, device=device).to(case.dtype)
    actual = torch.autograd.grad(quantized_gelu(x, *ranges), leaves(case, x, ranges), grad)
    out, quantized, _ = compose(case, x.to(wide(case.dtype)), ranges)
    *expected, upstream = torch.autograd.grad(
        out, [*leaves(case, x, ranges), quantized], grad.to(out.dtype)
    )
    half = case.dtype in (torch.bfloat16, torch.float16)
    close(actual[0], expected[0], 1e-2 if half else 1e-5)
    before = len(learned(case.before, ranges[0]))
    for i, (a, e) in enumerate(zip(actual[1:], expected[1:], strict=True)):
        terms = upstream if i < before else grad.to(out.dtype)
        assert_range_gradient(a, e, terms.abs().sum())


def test_not_finite(device):
    """As the composition: NaN stays, infinities saturate, and NaN counts as inside the range."""
    case = Case(shape=(4,))
    _, ranges = inputs(case, device)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=device, requires_grad=True)
    actual, (expected, *_) = quantized_gelu(x, *ranges), compose(case, x, ranges)
    assert actual[0].isnan() and actual[1:].isfinite().all()
    torch.testing.assert_close(actual, expected, equal_nan=True)
    (da,), (de,) = (torch.autograd.grad(y[1:].sum(), x) for y in (actual, expected))
    torch.testing.assert_close(da[1:], de[1:])


def test_empty(device):
    case = Case(shape=(3, 0))
    x, ranges = inputs(case, device)
    out = quantized_gelu(x, *ranges)
    assert out.shape == (3, 0)
    gradients = torch.autograd.grad(out.sum(), leaves(case, x, ranges))
    assert all(g.sum() == 0 for g in gradients)


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
def test_wanted_gradients_alone(wanted, device):
    """Any of x and the two ranges may be frozen."""
    x, ranges = inputs(Case(), device)
    groups = ([x], ranges[0].parameters, ranges[1].parameters[:2])
    assert_wanted_gradients_alone(lambda: quantized_gelu(x, *ranges), groups, wanted)


@pytest.mark.native
def test_repeatable(device):
    case = Case(shape=(200, 1001))
    x, ranges = inputs(case, device)
    assert_repeatable(lambda: quantized_gelu(x, *ranges), leaves(case, x, ranges))


def test_expanded_gradient(device):
    x, ranges = inputs(Case(), device)
    assert_takes_expanded_gradient(lambda: quantized_gelu(x, *ranges), x)


@pytest.mark.parametrize("case", [Case(), Case(dtype=torch.bfloat16), Case(layout="sliced")])
def test_opcheck(case, device):
    x, ranges = inputs(case, device)
    public = (x, *flat(ranges[0]), *flat(ranges[1]))
    torch.library.opcheck(torch.ops.asymq.quantized_gelu.default, public)
    opcheck_private(
        lambda: quantized_gelu(x, *ranges),
        ["_quantized_gelu.default", "_quantized_gelu_backward.default"],
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic, device):
    case = Case()
    x, ranges = inputs(case, device)
    assert_compiles(
        lambda x: quantized_gelu(x, *ranges).clone(), leaves(case, x, ranges), backend, dynamic
    )


def test_second_derivative_raises(device):
    x, ranges = inputs(Case(), device)
    assert_no_second_derivative(quantized_gelu(x, *ranges), x, "_quantized_gelu_backward")


def test_transforms_say_so(device):
    x, ranges = inputs(Case(), device)
    assert_transforms_say_so(lambda x: quantized_gelu(x, *ranges), x, "quantized_gelu")


def test_errors(device):
    x, (before, after) = inputs(Case(), device)
    two = before._replace(parameters=tuple(t.detach().expand(2) for t in before.parameters))
    double = before._replace(parameters=tuple(t.detach().double() for t in before.parameters))
    for message, call in (
        ("x must be float32", (x.long(), before, after)),
        (r"input's min_max: min must have one element, got shape \[2\]", (x, two, after)),
        ("output's min_max: min must have one element", (x, before, two)),
        ("min_max needs 2 parameters, got 4", (x, before._replace(parameters=after[1]), after)),
        ("output's beta_gamma: bits must be between 2", (x, before, after._replace(bits=1))),
        (
            "parameterization must be scale_offset",
            (x, after._replace(parameterization="r"), after),
        ),
        ("the output's range must have the dtype of the input's", (x.double(), double, after)),
    ):
        with pytest.raises(RuntimeError, match="asymq::quantized_gelu: .*" + message):
            quantized_gelu(*call)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype):
    case = Case(shape=(300, 1025), dtype=dtype)
    x, ranges = inputs(case, torch.device("cpu"))
    on_gpu = x.detach().cuda().requires_grad_(), [moved(r, "cuda") for r in ranges]

    def step(x, ranges):
        out = quantized_gelu(x, *ranges)
        return out, *torch.autograd.grad(out.square().sum(), leaves(case, x, ranges))

    gpu, cpu = step(*on_gpu), step(x, ranges)
    assert (gpu[0].cpu() != cpu[0]).sum() <= cpu[0].numel() // 1000
    for a, e in zip(gpu[1:], cpu[1:], strict=True):
        close(a.cpu(), e, 1e-2 if dtype == torch.bfloat16 else 1e-3)
