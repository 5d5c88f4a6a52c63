"""The operators against the reference, over the covering table and at the awkward points."""

import itertools
import math

import pytest
import torch
from compare import assert_bit_equal, assert_on_grid, assert_sums, term_sizes
from samples import COVERING, LINKS, PARAMETERIZATIONS, SAMPLES, DynamicSample, Sample, covering

import asymq
from asymq import reference

pytestmark = pytest.mark.composite

NAN, INF = math.nan, math.inf
EVERY = [*SAMPLES, *COVERING]
STATIC = [sample for sample in EVERY if not isinstance(sample, DynamicSample)]


def gradients(sample, module, x, parameters, grad, **keywords):
    """x̂, dL/dx and the gradients of the learned parameters."""
    learned = parameters[: len(sample.spec.learned)]
    xhat = sample.call(module, x, *parameters, **keywords)
    return xhat, *torch.autograd.grad(xhat, (x, *learned), grad)


def check(sample, inputs, **keywords):
    actual = gradients(sample, asymq, *inputs, **keywords)
    expected = gradients(sample, reference, *inputs, **keywords)
    # Everything else has one right answer.
    for a, e in zip(actual[:2], expected[:2], strict=True):
        if sample.loose:
            torch.testing.assert_close(a, e, rtol=1e-12, atol=0, equal_nan=True)
        else:
            assert_bit_equal(a, e)
        assert a.stride() == torch.empty_like(inputs.x).stride()
    terms = term_sizes(sample, reference, *inputs)
    exact = inputs.parameters[0].dtype == torch.float64
    for a, e, size in zip(actual[2:], expected[2:], terms, strict=True):
        assert_sums(a, e, size, exact=exact)


@pytest.mark.parametrize("sample", EVERY, ids=str)
def test_equals_reference(sample, device):
    check(sample, sample.build(device))


def test_covering_covers():
    """Every pair of two factors' values, in far fewer rows than all combinations."""
    factors = {"a": [1, 2, 3], "b": "xyz", "c": [True, False], "d": [None]}
    rows = covering(factors)
    for a, b in itertools.combinations(factors, 2):
        pairs = {(row[a], row[b]) for row in rows}
        assert pairs == set(itertools.product(factors[a], factors[b]))
    assert len(rows) <= 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_nan_values_count_as_inside(name, dtype, device):
    """x̂ and everything with G_in in it is NaN, dL/dx is the upstream gradient."""
    sample = Sample(name, dtype, "last", values="nan", bits=4)
    inputs = sample.build(device)
    check(sample, inputs)
    nan = inputs.x.isnan()
    assert nan.any() and not nan.all()
    xhat, grad_x, *grads = gradients(sample, asymq, *inputs)
    assert torch.equal(xhat.isnan(), nan)
    assert torch.equal(grad_x[nan], inputs.grad[nan])
    columns = nan.flatten(0, 2).any(0)
    has_inside = [n for n in sample.spec.learned if n not in ("offset", "koffset")]
    for learned, grad in zip(sample.spec.learned, grads, strict=True):
        assert torch.equal(grad.isnan().flatten(), columns & (learned in has_inside))


def test_infinite_values_saturate(device):
    x = torch.tensor([INF, -INF], device=device, requires_grad=True)
    ends = [torch.tensor(v, device=device, requires_grad=True) for v in (-1.0, 2.0)]
    xhat = asymq.fake_quantize_min_max(x, *ends, bits=2)
    assert xhat.tolist() == [2, -1]
    grads = torch.autograd.grad(xhat.sum(), (x, *ends))
    assert [g.tolist() for g in grads] == [[0, 0], 1, 1]


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_bad_upstream_outside_stays_out_of_the_inside(bad, device):
    """Selected, not multiplied: inf * 0 would be NaN."""
    x = torch.tensor([-5.0, 0.3, 5.0], device=device, requires_grad=True)
    scale = torch.ones(1, device=device, requires_grad=True)
    offset = torch.full((1,), -1.0, device=device, requires_grad=True)
    xhat = asymq.fake_quantize_scale_offset(x, scale, offset, bits=2)
    grad = torch.tensor([bad, 2.0, 1.0], device=device)
    grad_x, _, d_offset = torch.autograd.grad(xhat, (x, scale, offset), grad)
    assert grad_x.tolist() == [0, 2, 0]
    assert torch.equal(d_offset.isnan(), torch.tensor([math.isnan(bad)], device=device))
    # Below n = 0 the row of the scale is 0 · G_lo; with n = -0 · finite it must stay finite.
    x = torch.tensor([0.25, INF], device=device)
    high = torch.ones(1, device=device, requires_grad=True)
    xhat = asymq.fake_quantize_min_max(x, torch.zeros_like(high), high, bits=2)
    (d_high,) = torch.autograd.grad(xhat, high, torch.tensor([1.0, 3.0], device=device))
    assert d_high.isfinite().all()


def test_ties_round_half_to_even(device):
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], device=device) * 0.125
    scale = torch.tensor(0.125, device=device)
    xhat = asymq.fake_quantize_symmetric_scale(x, scale, bits=4)
    assert (xhat / scale).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    assert xhat.signbit().tolist() == [True, True, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_regions_are_closed(dtype, device):
    """Decided on the rounded value: x beyond p by less than half a step is inside."""
    x = torch.tensor([-7.75, -7.5, -7.25, 7.25, 7.5, 7.75], dtype=dtype, device=device)
    x.requires_grad_()
    scale = torch.ones(1, device=device)
    xhat = asymq.fake_quantize_symmetric_scale(x, scale, bits=4)
    (grad,) = torch.autograd.grad(xhat.sum(), x)
    assert grad.tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "sample", [Sample(n, values="extreme") for n in PARAMETERIZATIONS], ids=str
)
def test_denormals_are_not_flushed(sample, device):
    """x, s and x̂ below the smallest normal number."""
    tiny = 2.0**-135
    x = (torch.arange(-40, 41, device=device) * (tiny / 2)).requires_grad_()
    low, high = (torch.tensor([v * tiny], device=device) for v in (-4.0, 11.0))
    parameters = sample.spec.from_range(low, high, 15)
    eps = 2.0**-140
    sample = Sample(sample.parameterization, bits=4)
    if sample.parameterization in ("scale_offset", "kscale_koffset"):
        scale = (high - low) / 15
        parameters = (scale, low / scale)
        if sample.parameterization == "kscale_koffset":
            parameters = (high - low, low / scale / 15)
    xhat = sample.call(asymq, x, *parameters, eps=eps)
    assert_bit_equal(xhat, sample.call(reference, x, *parameters, eps=eps))
    assert len(xhat.unique()) >= 15


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("offset", [1e9, -1e9, 1e20, -1e20, INF, -INF, NAN])
@pytest.mark.parametrize("name", ["scale_offset", "kscale_koffset"])
def test_huge_offsets(name, offset, x_dtype, device):
    x = torch.tensor([-INF, -3e4, -1.0, 0.0, 0.7, 5e4, INF, NAN], dtype=x_dtype, device=device)
    x.requires_grad_()
    grad = torch.arange(1, 9, dtype=x_dtype, device=device)
    scale = torch.tensor([0.1], device=device, requires_grad=True)
    offset = torch.tensor([offset], device=device, requires_grad=True)
    sample = Sample(name)
    actual = gradients(sample, asymq, x, (scale, offset), grad)
    expected = gradients(sample, reference, x, (scale, offset), grad)
    assert_bit_equal(actual[0], expected[0])
    assert_bit_equal(actual[1], expected[1])
    for a, e in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=0, equal_nan=True)


ENDS = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 3e38, -3e38, INF, -INF, NAN]


@pytest.mark.parametrize(
    "name",
    ["min_max", "symmetric_max", "beta_gamma"] + [f"beta_gamma_{link}" for link in LINKS],
)
def test_ranges_of_every_kind(name, device):
    """Collapsed, reversed, overflowing, infinite and NaN ranges, one per row, all at once."""
    pairs = list(itertools.product(ENDS, ENDS))
    low, high = torch.tensor(pairs, device=device).unsqueeze(-1).unbind(1)
    x = torch.tensor([-1e38, -2.0, -0.3, 0.0, 0.1, 1.6, 4.0, 1e38], device=device)
    x = x.repeat(len(pairs), 1).requires_grad_()
    grad = torch.linspace(-1, 2, 8, device=device).repeat(len(pairs), 1)
    if name == "symmetric_max":
        parameters = (high.clone(),)
    elif name == "min_max":
        parameters = (low.clone(), high.clone())
    else:
        parameters = (torch.full_like(low, 0.75), torch.full_like(low, 4.0), low, high)
    sample = Sample(name)
    for parameter in parameters[: len(sample.spec.learned)]:
        parameter.requires_grad_()
    actual = gradients(sample, asymq, x, parameters, grad)
    expected = gradients(sample, reference, x, parameters, grad)
    assert_bit_equal(actual[0], expected[0])
    assert_bit_equal(actual[1], expected[1])
    for a, e in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_nan_parameter_makes_everything_nan(name, device):
    sample = Sample(name, granularity="one")
    for i in range(len(sample.spec.learned) + len(sample.spec.fixed)):
        x, parameters, grad = sample.build(device)
        with torch.no_grad():
            parameters[i].fill_(NAN)
        xhat, grad_x, *grads = gradients(sample, asymq, x, parameters, grad)
        assert xhat.isnan().all()
        assert torch.equal(grad_x, grad)
        for grad in grads:
            assert grad.isnan().all()


@pytest.mark.parametrize("link", ["sigmoid", "exp", "softplus", "clamp"])
def test_links_are_rounded_once(link, device):
    """f in float64, then float32: a float32 sigmoid differs on a third of all arguments."""
    gamma = torch.linspace(-30, 30, 100_001, device=device).unsqueeze(-1)
    x = torch.linspace(-1, 1, 5, device=device).repeat(len(gamma), 1)
    one = torch.ones_like(gamma)
    keywords = {"bits": 8, "link": link, "eps": 1e-30}
    actual = asymq.fake_quantize_symmetric_gamma(x, gamma, one, **keywords)
    assert_bit_equal(actual, reference.fake_quantize_symmetric_gamma(x, gamma, one, **keywords))


@pytest.mark.parametrize("module", [asymq, reference], ids=["operators", "reference"])
def test_sigmoid_is_a_link(module, device):
    sample = Sample("beta_gamma_sigmoid")
    x, parameters, grad = sample.build(device)

    def call(**link):
        out = module.fake_quantize_beta_gamma(x, *parameters, bits=8, **link)
        return out, *torch.autograd.grad(out, (x, *parameters[:2]), grad)

    for pair in zip(call(sigmoid=True), call(link="sigmoid"), strict=True):
        assert_bit_equal(*pair)
    assert all(map(torch.equal, call(sigmoid=True), call(sigmoid=True, link="sigmoid")))


def test_positive_links_keep_the_sign_of_an_end(device):
    """A range that contains 0 cannot turn over, however far its factors travel."""
    far = torch.tensor([-80.0, -9.0, 0.0, 9.0, 80.0], device=device).view(-1, 1)
    low, high = -torch.ones_like(far), torch.ones_like(far)
    for link in ("exp", "softplus", "sigmoid", "clamp"):
        options = {"bits": 4, "link": link, "eps": 1e-38}
        s, z = asymq.effective_scale_offset("beta_gamma", far, far.flip(0), low, high, **options)
        assert (s > 0).all() and (z <= 0).all() and (z >= -15).all(), link


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_gradient_scale_is_a_factor_of_the_ranges_gradients(sample, device):
    """By a power of two to the last bit, and nothing else changes."""
    inputs = sample.build(device)
    for module in (asymq, reference):
        plain = gradients(sample, module, *inputs)
        scaled = gradients(sample, module, *inputs, gradient_scale=0.25)
        for a, e in zip(scaled[:2], plain[:2], strict=True):
            assert_bit_equal(a, e)
        for a, e in zip(scaled[2:], plain[2:], strict=True):
            assert_bit_equal(a, 0.25 * e)


def test_sigmoid_still_learns_when_saturated(device):
    """The factor σ(1 - σ) of the rounded σ is exactly 0 beyond 17.4."""
    x = torch.tensor([5.0], device=device)
    gamma = torch.tensor([20.0], device=device, requires_grad=True)
    one = torch.ones(1, device=device)
    xhat = asymq.fake_quantize_symmetric_gamma(x, gamma, one, bits=8, sigmoid=True)
    (grad,) = torch.autograd.grad(xhat, gamma)
    expected = 254 / 255 / (math.exp(10) + math.exp(-10)) ** 2
    assert grad.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["min_max", "symmetric_gamma", "beta_gamma_sigmoid"])
def test_only_wanted_gradients_are_computed(name, device):
    """Every subset gets the same bits as all together, the rest gets None."""
    sample = Sample(name, granularity="axis1")
    x, parameters, grad = sample.build(device)
    leaves = (x, *parameters[: len(sample.spec.learned)])
    _, *together = gradients(sample, asymq, x, parameters, grad)
    for wanted in itertools.product([False, True], repeat=len(leaves)):
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
            leaf.grad = None
        xhat = sample.call(asymq, x, *parameters)
        assert xhat.requires_grad == any(wanted)
        if any(wanted):
            xhat.backward(grad)
        for leaf, want, expected in zip(leaves, wanted, together, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                assert_bit_equal(leaf.grad, expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("x_shape", [(), (1,), (5,), (2, 3)])
def test_one_element_ranges_have_any_number_of_dimensions(x_shape, shape, device):
    x = torch.randn(x_shape, device=device, requires_grad=True)
    high = torch.ones(shape, device=device, requires_grad=True)
    xhat = asymq.fake_quantize_symmetric_max(x, high, bits=4)
    assert_bit_equal(xhat, reference.fake_quantize_symmetric_max(x, high, bits=4))
    grad_x, grad = torch.autograd.grad(xhat.sum(), (x, high))
    assert grad_x.shape == x.shape and grad.shape == high.shape


@pytest.mark.parametrize("dims", [1, 3, 5, 6])
def test_any_number_of_dimensions(dims, device):
    """Axis 0 in blocks and the last axis in full."""
    shape = (4, 3, 2, 5, 2, 3)[:dims]
    ranges = (2, *(1,) * (dims - 2), shape[-1]) if dims > 1 else (2,)
    x = torch.randn(shape, device=device, requires_grad=True)
    ends = [torch.full(ranges, v, device=device, requires_grad=True) for v in (-1.0, 0.7)]
    actual = asymq.fake_quantize_min_max(x, *ends, bits=3)
    expected = reference.fake_quantize_min_max(x, *ends, bits=3)
    assert_bit_equal(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual.sum(), (x, *ends)),
        torch.autograd.grad(expected.sum(), (x, *ends)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 17))
def test_every_bit_width(bits, device):
    """Against exact arithmetic: the same scale and offset, the quotient in float64."""
    x = torch.randn(20_000, device=device)
    scale = torch.tensor(6 / (2**bits - 1), device=device)
    offset = torch.tensor(-0.4 * 2**bits, device=device)
    actual = asymq.fake_quantize_scale_offset(x, scale, offset, bits=bits)
    exact = [t.double() for t in (x, scale, offset)]
    expected = reference.fake_quantize_scale_offset(*exact, bits=bits)
    assert_on_grid(actual, expected, exact[0] / exact[1], exact[1])
    codes = asymq.quantize(x, scale, offset, bits=bits)
    assert codes.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert codes.min() == 0 and codes.max() == 2**bits - 1
    codes = asymq.quantize(x, scale / 2, bits=bits)
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert -codes.min() == codes.max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("sample", [s for s in STATIC if s.size != "millions"], ids=str)
def test_codes_equal_reference(sample, device):
    """effective_scale_offset, quantize and dequantize over the same table."""
    x, parameters, _ = sample.build(device, requires_grad=False)
    symmetric = sample.spec.function.startswith("symmetric")
    name = sample.spec.function
    if symmetric:
        name = {"scale": "scale_offset", "max": "min_max", "gamma": "beta_gamma"}[name[10:]]
    options = {"symmetric": symmetric, **sample.keywords()}
    scale, offset = asymq.effective_scale_offset(name, *parameters, **options)
    expected = reference.effective_scale_offset(name, *parameters, **options)
    assert (offset is None) == symmetric
    for a, e in zip((scale, offset), expected, strict=True):
        if sample.loose and a is not None:
            torch.testing.assert_close(a, e, rtol=1e-12, atol=0)
        elif a is not None:
            assert_bit_equal(a, e)

    options = {"bits": sample.bits, "full_range": sample.spec.full_range}
    codes = asymq.quantize(x, scale, offset, **options)
    expected = reference.quantize(x, scale, offset, **options)
    assert codes.dtype == expected.dtype
    assert_bit_equal(codes.int(), expected.int())
    before = codes.clone()
    assert not asymq.update_codes_(before, x, scale, offset, **options)
    assert torch.equal(before, codes)
    smaller = [asymq.update_codes_(before, x / 2, scale, offset, **options)]
    smaller += [reference.update_codes_(codes, x / 2, scale, offset, **options)]
    assert torch.equal(before, codes) and smaller[0] == smaller[1]
    values = asymq.dequantize(codes, scale, offset, **options)
    assert_bit_equal(values, reference.dequantize(codes, scale, offset, **options))
    assert values.dtype == scale.dtype


def test_codes_of_awkward_values(device):
    x = torch.tensor([NAN, INF, -INF, 0.0, 1e30], device=device)
    scale, offset = torch.tensor(0.5, device=device), torch.tensor(-3.0, device=device)
    assert asymq.quantize(x, scale, offset, bits=4).tolist() == [0, 15, 0, 3, 15]
    assert asymq.quantize(x, scale, bits=4).tolist() == [0, 7, -7, 0, 7]
    assert asymq.quantize(x, scale, bits=4, full_range=True).tolist() == [0, 7, -8, 0, 7]
    assert asymq.quantize(x, scale, offset * NAN, bits=4).tolist() == [0] * 5
    assert asymq.quantize(x, scale, offset * INF, bits=4)[3:].tolist() == [15, 15]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 8, 12, 16])
@pytest.mark.parametrize(
    "ranges",
    [(1,), (7, 1), (1, 384), (7, 12), (7, 384)],
    ids=["one", "row", "column", "group", "all"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_are_updated_where_they_changed(dtype, ranges, bits, symmetric, device):
    """Whatever the codes were, they become those of quantize, and what differs is counted."""
    x = torch.randn(7, 384, dtype=dtype, device=device)
    scale = torch.full(ranges, 4 / 2**bits, device=device) * (1 + torch.rand(ranges, device=device))
    offset = None if symmetric else torch.full(ranges, -(2.0 ** (bits - 1)), device=device)
    expected = asymq.quantize(x, scale, offset, bits=bits)
    for moved in (0, 1, 40, x.numel()):
        codes = expected.clone()
        some = torch.randperm(x.numel(), device=device)[:moved]
        codes.view(-1)[some] = codes.view(-1)[some] ^ 1
        changed = asymq.update_codes_(codes, x, scale, offset, bits=bits)
        assert torch.equal(codes, expected)
        assert (changed.dtype, changed.shape, changed.device) == (torch.int64, (), x.device)
        assert changed == moved


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "channels"])
def test_codes_of_any_layout_are_updated(layout, device):
    x = torch.randn(2, 6, 8, 4, device=device)
    codes = torch.zeros(2, 6, 8, 4, dtype=torch.uint8, device=device)
    if layout == "transposed":
        x = x.transpose(1, 3).contiguous().transpose(1, 3)
    elif layout == "sliced":
        x = torch.randn(2, 6, 8, 8, device=device)[..., ::2]
        codes = torch.zeros(4, 6, 8, 4, dtype=torch.uint8, device=device)[::2]
    elif layout == "channels":
        codes = codes.to(memory_format=torch.channels_last)
    scale, offset = torch.full((1, 6, 1, 1), 0.1, device=device), torch.tensor(-3.0, device=device)
    offset = offset.expand_as(scale)
    expected = asymq.quantize(x, scale, offset, bits=4)
    strides = codes.stride()
    assert asymq.update_codes_(codes, x, scale, offset, bits=4) == expected.count_nonzero()
    assert torch.equal(codes, expected) and codes.stride() == strides
    nothing = torch.empty(0, 3, device=device)
    codes = asymq.quantize(nothing, scale.flatten()[:1], bits=4)
    assert asymq.update_codes_(codes, nothing, scale.flatten()[:1], bits=4) == 0


def test_updated_codes_are_another_version(device):
    """Whoever keeps codes for a backward pass is told, as of torch's in-place operations."""
    x, scale = torch.randn(8, device=device), torch.tensor(0.5, device=device)
    codes = asymq.quantize(x, scale, bits=4)
    y = torch.ones(8, device=device, requires_grad=True) * codes
    asymq.update_codes_(codes, x, scale, bits=4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_codes_have_no_gradient(device):
    x = torch.randn(8, device=device, requires_grad=True)
    scale = torch.tensor(0.5, device=device, requires_grad=True)
    codes = asymq.quantize(x, scale, bits=4)
    assert not codes.requires_grad
    assert not asymq.dequantize(codes, scale, bits=4).requires_grad


def test_inputs_are_left_alone(device):
    sample = Sample("beta_gamma", granularity="last", values="nan")
    x, parameters, grad = sample.build(device)
    before = [t.detach().clone() for t in (x, *parameters, grad)]
    gradients(sample, asymq, x, parameters, grad)
    for tensor, copy in zip((x, *parameters, grad), before, strict=True):
        assert_bit_equal(tensor, copy)
