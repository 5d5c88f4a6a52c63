"""The reference against reverse-mode differentiation of eq. 1, which knows no hand-written row."""

import pytest
import torch
from compare import assert_bit_equal, spread
from samples import (
    DYNAMIC,
    DYNAMIC_GRANULARITIES,
    GRANULARITIES,
    LINKS,
    PARAMETERIZATIONS,
    SIGNS,
    DynamicSample,
    Sample,
)

from asymq import reference


def _round(u):
    """rint with the straight-through gradient."""
    return u + (u.round() - u).detach()


def _clip(q, low, high):
    """Gradient 1 on the closed interval, 0 outside, whatever torch.clamp does at the bounds."""
    inside = (q >= low) & (q <= high)
    return torch.where(inside, q, q.detach().clamp(low, high))


def _clamp(v):
    """LINKS["clamp"] with the straight-through gradient."""
    return v + (v.clamp(0.25, 4) - v).detach()


def _compose(name, k, x, *p):
    """Eq. 1 after the formulas of eqs. 1, 3, 9 and Table 3, float64, ranges of x's shape."""
    full_range = name.endswith("full_range")
    name = name.removesuffix("_full_range")
    base, _, link = name.rpartition("_")
    if link in LINKS:
        learned, f = len(p) // 2, _clamp if link == "clamp" else LINKS[link][0]
        p = (*(f(v) for v in p[:learned]), *p[learned:])
        name = base
    match name:
        case "scale_offset":
            s, z = p
        case "min_max":
            s = (p[1] - p[0]) / k
            z = p[0] / s
        case "beta_gamma":
            s = (p[1] * p[3] - p[0] * p[2]) / k
            z = p[0] * p[2] / s
        case "kscale_koffset":
            s, z = p[0] / k, k * p[1]
        case _:
            half = (k + 1) / 2 if full_range else (k - 1) / 2 if name.startswith("token") else k / 2
            s = {
                "symmetric_scale": lambda s: s,
                "symmetric_max": lambda high: high / half,
                "symmetric_gamma": lambda gamma, high: gamma * high / half,
                "token_symmetric_gamma": lambda gamma, high: gamma * high / half,
            }[name](*p)
            return s * _clip(_round(x / s), -(k - 1) / 2 - full_range, (k - 1) / 2)
    return s * (_clip(_round(x / s) - _round(z), 0, k) + _round(z))


@pytest.mark.parametrize("range", ["straddle", "positive", "negative"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_equals_autograd_of_the_composition(name, granularity, range):
    sample = Sample(name, "float64", granularity, bits=4, range=range)
    x, parameters, grad = sample.build()
    learned = parameters[: len(sample.spec.learned)]
    actual = sample.call(reference, x, *parameters)
    expected = _compose(name, 15, x, *(spread(p, x.shape) for p in parameters))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(
        torch.autograd.grad(actual, (x, *learned), grad),
        torch.autograd.grad(expected, (x, *learned), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("granularity", DYNAMIC_GRANULARITIES)
@pytest.mark.parametrize("name", DYNAMIC)
def test_live_ranges_equal_autograd_of_the_composition(name, granularity, signs):
    sample = DynamicSample(name, "float64", granularity, bits=4, range=signs)
    x, factors, grad = sample.build()
    actual = sample.call(reference, x, *factors)

    group = sample.keywords()["group"] or x.shape[-1]
    blocks = x.unflatten(-1, (x.shape[-1] // group, group))
    low, high = blocks.detach().aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    high = torch.where(low == high, 1.0, high)  # zeros are zeros on any grid
    ends = (low, high) if len(factors) == 2 else (torch.maximum(-low, high),)
    static = name.removeprefix("dynamic_")
    if static.startswith("symmetric") and not static.endswith("full_range"):
        static = f"token_{static}"
    expected = _compose(static, 15, blocks, *(p.unsqueeze(-1) for p in factors), *ends)
    expected = expected.reshape(x.shape)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(
        torch.autograd.grad(actual, (x, *factors), grad),
        torch.autograd.grad(expected, (x, *factors), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("low, high", [(0.7, 0.7), (500.0, 500.0), (0.5, -1.0), (1e4, -1e4)])
def test_collapsed_and_reversed_ranges_recover(low, high):
    """Outside, θmin and θmax together get the whole gradient, in shares of at most ζ/k beyond
    0 and 1: nothing is amplified by the tiny scale and nothing is lost."""
    x = torch.linspace(-2, 2, 101)
    ends = [torch.full_like(x, v, requires_grad=True) for v in (low, high)]
    xhat = reference.fake_quantize_min_max(x, *ends, bits=8)
    d_low, d_high = torch.autograd.grad(xhat.sum(), ends)
    outside = d_low + d_high
    assert ((outside - 1).abs() < 1e-6).sum() >= 99
    assert (d_low.abs() <= 1 + 0.5 / 255).all() and (d_high.abs() <= 1 + 0.5 / 255).all()


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_gradients_stay_off_unless_asked_for(name):
    sample = Sample(name)
    x, parameters, grad = sample.build(requires_grad=False)
    assert not sample.call(reference, x, *parameters).requires_grad
    x.requires_grad_()
    (grad_x,) = torch.autograd.grad(sample.call(reference, x, *parameters), x, grad)
    assert grad_x.shape == x.shape


@pytest.mark.parametrize(
    "sample",
    [
        *(Sample("beta_gamma_sigmoid", granularity=g) for g in ("one", "axis0", "groups")),
        *(DynamicSample("dynamic_beta_gamma_sigmoid", granularity=g) for g in ("token", "groups")),
    ],
    ids=str,
)
def test_compiles(sample):
    """It is the compiled baseline of the benchmarks."""
    x, parameters, grad = sample.build()

    def step(call):
        y = call(reference, x, *parameters)
        return y, *torch.autograd.grad(y, (x, *parameters[:2]), grad)

    compiled = torch.compile(sample.call, fullgraph=True, dynamic=False, backend="aot_eager")
    for actual, expected in zip(step(compiled), step(sample.call), strict=True):
        assert_bit_equal(actual, expected)


class Live(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group = group
        self.gamma = torch.nn.Parameter(torch.full((1,), 0.8))

    def forward(self, x):
        keywords = {"group": self.group, "bits": 4}
        return reference.fake_quantize_dynamic_symmetric_gamma(x, self.gamma, **keywords)


@pytest.mark.parametrize("group", [None, 3])
def test_exports_with_any_number_of_tokens(group):
    axes = {axis: torch.export.Dim(name, min=2) for axis, name in enumerate(("batch", "tokens"))}
    module = Live(group)
    example = (torch.randn(4, 5, 6),)
    program = torch.export.export(module, example, dynamic_shapes={"x": axes}).module()
    for shape in ((4, 5, 6), (3, 8, 6)):
        x = torch.randn(shape)
        assert_bit_equal(program(x), module(x))


def test_errors():
    x = torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match=r"group 4 must divide .* shape is \[4, 6\]"):
        reference.fake_quantize_dynamic_symmetric_gamma(x, torch.ones(1), group=4, bits=8)
    with pytest.raises(RuntimeError, match=r"shape \[3\] do not fit the 2 groups of a row"):
        reference.fake_quantize_dynamic_symmetric_gamma(x, torch.ones(3), group=3, bits=8)
    with pytest.raises(RuntimeError, match="full_range needs a symmetric grid"):
        reference.quantize(x, torch.ones(1), torch.ones(1), bits=8, full_range=True)
    with pytest.raises(RuntimeError, match=r"\[4, 4\] do not divide x's shape \[4, 6\]"):
        reference.fake_quantize_symmetric_scale(x, torch.ones(4, 4), bits=8)
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match="max must not require grad"):
        reference.fake_quantize_symmetric_gamma(x, one, one.clone().requires_grad_(), bits=8)
    with pytest.raises(ValueError, match="'kscale_koffset' with symmetric=True"):
        reference.effective_scale_offset("kscale_koffset", one, bits=8, symmetric=True)


@pytest.mark.parametrize(
    "sample",
    [
        *(Sample(name, granularity=g) for name in PARAMETERIZATIONS for g in ("one", "last")),
        *(DynamicSample(name, granularity="positions") for name in DYNAMIC),
    ],
    ids=str,
)
def test_torch_func(sample):
    x, parameters, grad = sample.build()
    learned = len(sample.spec.learned)

    def loss(x, *parameters):
        return (sample.call(reference, x, *parameters) * grad).sum()

    expected = torch.autograd.grad(loss(x, *parameters), (x, *parameters[:learned]))
    tensors = [t.detach() for t in (x, *parameters)]
    places = tuple(range(1 + learned))
    for a, e in zip(torch.func.grad(loss, places)(*tensors), expected, strict=True):
        assert_bit_equal(a, e)


def test_gradients_of_each_sample():
    x, parameters, _ = Sample("min_max").build()
    tensors = [t.detach() for t in parameters]

    def loss(x, *parameters):
        return reference.fake_quantize_min_max(x, *parameters, bits=4).square().sum()

    places = (0, 1, 2)
    actual = torch.func.vmap(torch.func.grad(loss, places), (0, None, None))(x.detach(), *tensors)
    each = [torch.func.grad(loss, places)(v, *tensors) for v in x.detach()]
    for a, e in zip(actual, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(e))


def test_second_derivatives_raise():
    """Never a silent zero."""
    x, parameters, _ = Sample("min_max").build()
    tensors = [t.detach() for t in parameters]

    def loss(x, *parameters):
        return reference.fake_quantize_min_max(x, *parameters, bits=4).square().sum()

    (grad,) = torch.autograd.grad(loss(x, *parameters), x, create_graph=True)
    message = "asymq.reference: fake_quantize has no second derivative"
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=message):
        first = torch.func.grad(loss)
        torch.func.grad(lambda x: first(x, *tensors).sum())(x.detach())
