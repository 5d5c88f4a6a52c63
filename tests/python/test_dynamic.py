"""Ranges that are live: what only they can get wrong. The table of samples covers the rest."""

import math

import pytest
import torch
from compare import assert_bit_equal, assert_sums
from samples import DYNAMIC, DynamicSample

import asymq
from asymq import ops, reference

pytestmark = pytest.mark.composite

BETA_GAMMA = asymq.fake_quantize_dynamic_beta_gamma
GAMMA = asymq.fake_quantize_dynamic_symmetric_gamma


def ones(device, *shape):
    return torch.ones(shape or (1,), device=device, requires_grad=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_at_one_the_ends_are_on_the_grid(bits, device):
    """The int8 and int4 of runtimes: the largest magnitude is the last code, and no tie."""
    x = torch.randn(50, 33, device=device, requires_grad=True)
    top = x.detach().abs().amax(-1, keepdim=True)
    for full_range, last in ((False, 2 ** (bits - 1) - 1), (True, 2 ** (bits - 1))):
        xhat = GAMMA(x, ones(device), bits=bits, full_range=full_range)
        expected = torch.round(x / (top / last)).clamp(-last, 2 ** (bits - 1) - 1) * (top / last)
        torch.testing.assert_close(xhat, expected, rtol=1e-6, atol=0)
    xhat = GAMMA(x, ones(device), bits=bits)
    (grad,) = torch.autograd.grad(xhat.sum(), x)
    assert (grad == 1).all()

    xhat = BETA_GAMMA(x, ones(device), ones(device), bits=bits)
    scale = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / (2**bits - 1)
    assert ((xhat - x).abs().amax(-1) <= 1.001 * scale).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_zero_is_in_the_range_of_one_sign(sign, device):
    x = sign * (1 + torch.rand(4, 64, device=device))
    xhat = BETA_GAMMA(x, ones(device), ones(device), bits=8)
    step = x.abs().amax(-1, keepdim=True) / 255
    assert ((xhat - x).abs() <= 0.501 * step).all()
    zero_end, other = (0, 1) if sign > 0 else (1, 0)
    factors = [ones(device), ones(device)]
    grads = torch.autograd.grad(BETA_GAMMA(x, *factors, bits=4).sum(), factors)
    assert grads[zero_end] == 0 and grads[other] != 0


@pytest.mark.parametrize("name", DYNAMIC)
def test_zeros_stay_zeros(name, device):
    sample = DynamicSample(name)
    x = torch.zeros(3, 8, device=device, requires_grad=True)
    factors = [ones(device) for _ in sample.spec.learned]
    xhat = sample.call(asymq, x, *factors)
    grads = torch.autograd.grad(xhat.sum(), (x, *factors))
    assert (xhat == 0).all() and (grads[0] == 1).all()
    assert all(grad == 0 for grad in grads[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", DYNAMIC)
def test_what_is_not_finite_stays_in_its_group(name, bad, dtype, device):
    """Wherever it is in the group, whatever the factor's sign; dL/dx passes it on."""
    sample = DynamicSample(name, bits=4)
    group, function = 70, f"fake_quantize_{sample.spec.function}"
    keywords = sample.keywords() | {"group": group}
    clean = torch.randn(6, 4 * group, device=device).to(dtype)
    for place, factor in ((0, 1.0), (69, 0.7), (35, -1.0), (64, 0.0)):
        x = clean.clone()
        x[2, group + place] = bad
        factors = [ones(device) * factor for _ in sample.spec.learned]
        xhat = getattr(asymq, function)(x.requires_grad_(), *factors, **keywords)
        expected = getattr(asymq, function)(clean, *factors, **keywords)
        there = torch.zeros_like(x, dtype=torch.bool)
        there[2, group : 2 * group] = True
        assert xhat[there].isnan().all()
        assert_bit_equal(xhat[~there], expected[~there])
        grads = torch.autograd.grad(xhat, (x, *factors), torch.ones_like(x))
        assert (grads[0][there] == 1).all()
        assert all(grad.isnan() for grad in grads[1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dynamic_beta_gamma", "dynamic_symmetric_gamma_sigmoid"])
@pytest.mark.parametrize("shape, group", [((2, 70_001), None), ((1, 1 << 17), None)])
def test_long_rows(name, dtype, shape, group, device):
    sample = DynamicSample(name, dtype)
    x = torch.randn(shape, device=device).to(
        torch.float32 if dtype == "float32" else torch.bfloat16
    )
    x.requires_grad_()
    grad = torch.randn_like(x)
    factors = [0.7 * ones(device).detach() for _ in sample.spec.learned]
    factors = [factor.requires_grad_() for factor in factors]
    actual = sample.call(asymq, x, *factors)
    expected = sample.call(reference, x, *factors)
    assert_bit_equal(actual, expected)
    a = torch.autograd.grad(actual, (x, *factors), grad)
    e = torch.autograd.grad(expected, (x, *factors), grad)
    assert_bit_equal(a[0], e[0])
    size = grad.double().abs().sum()
    for got, want in zip(a[1:], e[1:], strict=True):
        assert_sums(got, want, size.expand_as(want))


def test_gradients_of_factors_are_sums_in_double(device):
    """Against float64 sums of each group's own gradients: one factor for very many groups."""
    x = torch.randn(3000, 256, device=device)
    grad = torch.rand(3000, 256, device=device)
    shared = [ones(device), ones(device)]
    keywords = {"bits": 3, "group": 64}
    xhat = BETA_GAMMA(x, *(0.6 * factor for factor in shared), **keywords)
    totals = torch.autograd.grad(xhat, shared, grad)
    low, high = (end.unflatten(-1, (4, 64)) for end in (x, x))
    low, high = low.amin(-1).clamp(max=0), high.amax(-1).clamp(min=0)
    own = [torch.full_like(low, 0.6, requires_grad=True) for _ in shared]
    xhat = asymq.fake_quantize_beta_gamma(x, *own, low, high, bits=3)
    for total, each in zip(totals, torch.autograd.grad(xhat, own, grad), strict=True):
        expected = 0.6 * each.double().sum()
        assert (total.double() - expected).abs() <= 1e-6 * expected.abs()


def test_heads_are_not_copied(device):
    """A view whose last axis is dense is read and written in the order of memory, where the order
    of the rows does not matter to the shared factors."""
    batch = torch.randn(2, 5, 3, 8, device=device)
    x = batch.transpose(1, 2).detach().requires_grad_()
    gamma = ones(device)
    xhat = GAMMA(x, gamma, bits=4)
    assert xhat.stride() == x.stride()
    assert_bit_equal(xhat, GAMMA(x.contiguous(), gamma, bits=4))
    grad = torch.randn(2, 3, 5, 8, device=device)
    grads = torch.autograd.grad(xhat, (x, gamma), grad)
    expected = torch.autograd.grad(GAMMA(x.contiguous(), gamma, bits=4), (x, gamma), grad)
    assert_bit_equal(grads[0], expected[0])
    torch.testing.assert_close(grads[1], expected[1])


@pytest.mark.parametrize("factors", ["one", "positions", "own"])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"symmetric": True, "full_range": True}]
)
@pytest.mark.parametrize("link", ["identity", "sigmoid", "softplus"])
@pytest.mark.parametrize("module", [ops, reference], ids=["operators", "reference"])
def test_weights_are_the_static_operator_on_their_extrema(module, link, options, factors, device):
    """To the last bit, zero in the range or not."""
    x = torch.randn(6, 24, device=device)
    x[0] += 9
    x.requires_grad_()
    grad = torch.randn(6, 24, device=device)
    shape = {"one": (1,), "positions": (3,), "own": (6, 3)}[factors]
    count = 1 if options.get("symmetric") else 2
    learned = [(0.6 + torch.rand(shape, device=device) / 2) for _ in range(count)]
    learned = [factor.requires_grad_() for factor in learned]
    common = {"bits": 4, "link": link, "gradient_scale": 0.5}
    actual = module._fake_quantize_live(x, *learned, group=8, **common, **options)

    low, high = x.detach().unflatten(-1, (3, 8)).aminmax(dim=-1)
    own = [factor.detach().expand(6, 3).contiguous().requires_grad_() for factor in learned]
    if count == 1:
        ends, function = (torch.maximum(-low, high),), asymq.fake_quantize_symmetric_gamma
        common["full_range"] = options.get("full_range", False)
    else:
        ends, function = (low, high), asymq.fake_quantize_beta_gamma
    expected = function(x, *own, *ends, **common)
    assert_bit_equal(actual, expected)
    grads = torch.autograd.grad(actual, (x, *learned), grad)
    each = torch.autograd.grad(expected, (x, *own), grad)
    assert_bit_equal(grads[0], each[0])
    for got, want in zip(grads[1:], each[1:], strict=True):
        want = want.sum() if factors == "one" else want.sum(0) if factors == "positions" else want
        torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 6)])
@pytest.mark.parametrize("module", [asymq, reference], ids=["operators", "reference"])
def test_without_elements(module, shape, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    factors = [ones(device), ones(device)]
    xhat = module.fake_quantize_dynamic_beta_gamma(x, *factors, bits=8)
    grads = torch.autograd.grad(xhat.sum(), (x, *factors))
    assert xhat.shape == grads[0].shape == shape
    assert [grad.tolist() for grad in grads[1:]] == [[0.0], [0.0]]
