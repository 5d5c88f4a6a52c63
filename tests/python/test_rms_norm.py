"""The quantized RMSNorm against the composition of our own operators and torch's."""

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
    wide,
)
from samples import DYNAMIC, PARAMETERIZATIONS
from torch import Tensor

from asymq.ops import quantized_rms_norm

pytestmark = pytest.mark.composite

EPS = 1e-5
RANGE = (-2.1, 1.7)  # narrower than what comes, so that some is clipped


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (5, 7, 48)
    dtype: torch.dtype = torch.float32
    output: str | None = "dynamic_beta_gamma"  # row of samples.PARAMETERIZATIONS or DYNAMIC
    group: int | None = None
    layout: str = "dense"
    range_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape))
        return "-".join([shape, dtype, str(self.output), str(self.group), self.layout])


CASES = [
    # Rows of less than a vector, of a few lanes, of a warp, of blocks with one to four vectors a
    # thread, with threads that have none, and longer than a kernel takes; more rows than teams.
    *(
        Case(shape=shape)
        for shape in (
            (3,),
            (4, 7),
            (9, 4),
            (5, 20),
            (700, 128),
            (3, 132),
            (1200, 1000),
            (3, 1028),
            (2, 5000),
            (2, 8192),
            (2, 8200),
        )
    ),
    *(Case(shape=(37, 512), output=output) for output in (None, "min_max", "beta_gamma")),
    *(
        Case(dtype=dtype, shape=shape, output=output)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for shape, output in (
            ((3, 7), "dynamic_beta_gamma"),
            ((40, 2048), "dynamic_beta_gamma"),
            ((3, 4096), "dynamic_symmetric_gamma"),
            ((9, 128), "min_max"),
            ((9, 136), None),
        )
    ),
    Case(dtype=torch.float64, range_dtype=torch.float64),
    *(Case(output=name) for name in (*PARAMETERIZATIONS, *DYNAMIC)),
    *(Case(group=group) for group in (16, 48)),
    *(Case(layout=layout) for layout in ("transposed", "offset", "sliced", "expanded")),
]


def inputs(case: Case, device):
    x = in_layout(case.layout, case.shape, device)
    x = 3 * x if case.layout == "dense" else x
    weight = 1 + torch.randn(case.shape[-1], device=device) / 4
    range_ = None
    if case.output is not None:
        range_ = quantizer(case.output, *RANGE, case.range_dtype, device)
        range_ = range_._replace(group=case.group)
    leaves = (t.to(case.dtype).detach().requires_grad_() for t in (x, weight))
    return *leaves, range_


def fused(x: Tensor, weight: Tensor, range_) -> Tensor:
    return quantized_rms_norm(x, weight, range_, eps=EPS)


def compose(case: Case, x: Tensor, weight: Tensor, range_):
    """As LlamaRMSNorm computes it: the result, and what is quantized."""
    values = x.to(wide(x.dtype))
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPS)
    raw = weight * values.to(x.dtype)
    return raw if range_ is None else fake_quantize(raw, case.output, range_), raw


def leaves(case: Case, x: Tensor, weight: Tensor, range_) -> list[Tensor]:
    return [x, weight, *(learned(case.output, range_) if range_ is not None else ())]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, device):
    x, weight, range_ = inputs(case, device)
    actual = fused(x, weight, range_)
    assert actual.dtype == case.dtype and actual.shape == x.shape and actual.is_contiguous()
    expected, raw = compose(case, x, weight, range_)
    assert_same_codes(actual, expected, raw)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, device):
    x, weight, range_ = inputs(case, device)
    grad = torch.randn(case.shape, device=device).to(case.dtype)
    of = leaves(case, x, weight, range_)
    actual = torch.autograd.grad(fused(x, weight, range_), of, grad)
    # Above the rounding of 16-bit single operations, which the fused backward does not have.
    out, raw = compose(case, x, weight, range_)
    expected = torch.autograd.grad(out, of, grad)
    half = case.dtype in (torch.bfloat16, torch.float16)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        close(a, e, 3e-2 if half else 1e-5)
    terms = (grad.double() * (1 + raw.detach().double().abs())).abs().sum()
    for a, e in zip(actual[2:], expected[2:], strict=True):
        assert_range_gradient(a, e, terms)


def test_not_finite(device):
    """A NaN or an infinity shows in its own row alone."""
    x, weight, range_ = inputs(Case(shape=(4, 64)), device)
    with torch.no_grad():
        x[0, 3], x[2, 5] = torch.nan, torch.inf
    out = fused(x, weight, range_)
    assert out[[0, 2]].isnan().all() and out[[1, 3]].isfinite().all()
    (gradient,) = torch.autograd.grad(out[[1, 3]].sum(), x)
    assert gradient[[1, 3]].isfinite().all()


def test_zeros(device):
    """A row of zeros stays one, and has a gradient."""
    x, weight, range_ = inputs(Case(shape=(3, 64)), device)
    out = fused(x * 0, weight, range_)
    assert (out == 0).all()
    for gradient in torch.autograd.grad(out.sum(), [weight, *range_.parameters]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("output", [None, "min_max", "dynamic_beta_gamma"])
def test_empty(shape, output, device):
    case = Case(shape=shape, output=output)
    x, weight, range_ = inputs(case, device)
    out = fused(x, weight, range_)
    assert out.shape == shape
    gradients = torch.autograd.grad(out.sum(), leaves(case, x, weight, range_))
    assert all(g.sum() == 0 for g in gradients)


@pytest.mark.parametrize("output", ["min_max", "dynamic_beta_gamma"])
@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
def test_wanted_gradients_alone(wanted, output, device):
    """Any of x, the weight and the range may be frozen."""
    x, weight, range_ = inputs(Case(output=output), device)
    groups = ([x], [weight], range_.parameters)
    assert_wanted_gradients_alone(lambda: fused(x, weight, range_), groups, wanted)


@pytest.mark.native
@pytest.mark.parametrize("output", ["min_max", "dynamic_beta_gamma"])
def test_repeatable(output, device):
    case = Case(shape=(2000, 1024), output=output)
    x, weight, range_ = inputs(case, device)
    assert_repeatable(lambda: fused(x, weight, range_), leaves(case, x, weight, range_))


def test_expanded_gradient(device):
    x, weight, range_ = inputs(Case(), device)
    assert_takes_expanded_gradient(lambda: fused(x, weight, range_), x)


@pytest.mark.parametrize(
    "case",
    [Case(), Case(output="min_max"), Case(output=None), Case(dtype=torch.bfloat16, group=16)],
    ids=str,
)
def test_opcheck(case, device):
    x, weight, range_ = inputs(case, device)
    torch.library.opcheck(
        torch.ops.asymq.quantized_rms_norm.default, (x, weight, EPS, *flat(range_))
    )
    opcheck_private(
        lambda: fused(x, weight, range_),
        ["_quantized_rms_norm.default", "_quantized_rms_norm_backward.default"],
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic, device):
    case = Case()
    x, weight, range_ = inputs(case, device)
    assert_compiles(
        lambda x: fused(x, weight, range_).clone(),
        leaves(case, x, weight, range_),
        backend,
        dynamic,
    )


def test_second_derivative_raises(device):
    x, weight, range_ = inputs(Case(), device)
    assert_no_second_derivative(fused(x, weight, range_), x, "_quantized_rms_norm_backward")


def test_transforms_say_so(device):
    x, weight, range_ = inputs(Case(), device)
    assert_transforms_say_so(lambda x: fused(x, weight, range_), x, "quantized_rms_norm")


def test_errors(device):
    x, weight, range_ = inputs(Case(), device)
    _, _, stored = inputs(Case(output="min_max"), device)
    for message, call in (
        (r"x must have at least one dimension.* got shape \[\]", (x.sum(), weight, range_)),
        ("x must be float32", (x.long(), weight, range_)),
        (
            r"weight must have one element for each.* shape \[48\], got \[47\]",
            (x, weight[1:], range_),
        ),
        ("weight must be Float .* like x, got Double", (x, weight.double(), range_)),
        (
            "output's beta_gamma: group must divide .* 48 elements, got 5",
            (x, weight, range_._replace(group=5)),
        ),
        ("output's beta_gamma: bits must be between 2", (x, weight, range_._replace(bits=1))),
        ("output's min_max: a live range needs factors", (x, weight, stored._replace(token=True))),
        ("beta_gamma needs the parameter min", (x, weight, range_._replace(token=False))),
    ):
        with pytest.raises(RuntimeError, match="asymq::quantized_rms_norm: .*" + message):
            fused(*call)
    with pytest.raises(RuntimeError, match="asymq::quantized_rms_norm: eps must be positive"):
        quantized_rms_norm(x, weight, range_, eps=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype):
    case = Case(shape=(300, 1024), dtype=dtype)
    x, weight, range_ = inputs(case, torch.device("cpu"))
    on_gpu = [t.detach().cuda().requires_grad_() for t in (x, weight)]

    def step(x, weight, range_):
        out = fused(x, weight, range_)
        of = leaves(case, x, weight, range_)
        return out, *torch.autograd.grad(out.square().sum(), of)

    gpu, cpu = step(*on_gpu, moved(range_, "cuda")), step(x, weight, range_)
    assert_same_codes(gpu[0].cpu(), cpu[0], cpu[0])
    for a, e in zip(gpu[1:], cpu[1:], strict=True):
        close(a.cpu(), e, 3e-2 if dtype == torch.bfloat16 else 1e-3)
