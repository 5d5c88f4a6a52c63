"""Properties that hold for every input, searched for counterexamples."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import asymq

FEW = settings(max_examples=100, deadline=None, derandomize=True)

BITS = st.integers(2, 16)
END = st.floats(-100, 100, width=32)
WIDTH = st.floats(0.0625, 200, width=32)
# Places relative to the range: 0 is its lower end, 1 its upper end.
PLACES = st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=40)


def _inputs(low, width, places, dtype):
    low, width = (torch.tensor(v, dtype=dtype) for v in (low, width))
    x = low + width * torch.tensor(places, dtype=dtype)
    return x, low, low + width


@FEW
@given(BITS, END, WIDTH, PLACES)
def test_euler_identities(bits, low, width, places):
    """∂θmin + ∂θmax is 0 inside and 1 outside, θmin ∂θmin + θmax ∂θmax + x ∂x = x̂."""
    x, low, high = _inputs(low, width, places, torch.float64)
    leaves = [t.expand_as(x).clone().requires_grad_() for t in (x, low, high)]
    xhat = asymq.fake_quantize_min_max(*leaves, bits=bits)
    d_x, d_low, d_high = torch.autograd.grad(xhat.sum(), leaves)
    torch.testing.assert_close(d_low + d_high, 1 - d_x, rtol=0, atol=1e-12)
    size = float(low.abs() + high.abs() + x.abs().max())
    torch.testing.assert_close(
        low * d_low + high * d_high + x * d_x, xhat.detach(), rtol=0, atol=1e-12 * size
    )


@FEW
@given(BITS, END, WIDTH, PLACES)
def test_euler_identity_of_the_scale(bits, low, width, places):
    """s ∂s + x ∂x = x̂ at fixed z."""
    x, low, high = _inputs(low, width, places, torch.float64)
    scale, offset = asymq.effective_scale_offset("min_max", low, high, bits=bits)
    leaves = [t.expand_as(x).clone().requires_grad_() for t in (x, scale, offset)]
    xhat = asymq.fake_quantize_scale_offset(*leaves, bits=bits)
    d_x, d_scale, d_offset = torch.autograd.grad(xhat.sum(), leaves)
    size = float(low.abs() + high.abs() + x.abs().max())
    torch.testing.assert_close(scale * d_scale + x * d_x, xhat.detach(), rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(d_offset, scale * (1 - d_x), rtol=1e-12, atol=0)


@FEW
@given(BITS, END, WIDTH, PLACES)
def test_forward(bits, low, width, places):
    """Monotone, idempotent, at most half a step off, and equal to codes and back."""
    x, low, high = _inputs(low, width, sorted(places), torch.float32)
    scale, offset = asymq.effective_scale_offset("min_max", low, high, bits=bits)

    def quantized(x):
        return asymq.fake_quantize_min_max(x, low, high, bits=bits)

    xhat = quantized(x)
    assert (xhat.diff() >= 0).all()
    assert torch.equal(quantized(xhat), xhat)

    codes = asymq.quantize(x, scale, offset, bits=bits)
    assert (codes >= 0).all() and (codes <= 2**bits - 1).all()
    assert torch.equal(asymq.dequantize(codes, scale, offset, bits=bits), xhat)

    inner = (codes > 0) & (codes < 2**bits - 1)
    rounding = 4 * torch.finfo(torch.float32).eps * x.abs()
    assert ((xhat - x).abs() <= scale / 2 + rounding)[inner].all()


@FEW
@given(BITS, WIDTH, PLACES)
def test_symmetric_forward(bits, high, places):
    """Odd as well."""
    high = torch.tensor(high)
    x = high * (torch.tensor(sorted(places)) - 0.5) * 2
    scale, offset = asymq.effective_scale_offset("min_max", high, bits=bits, symmetric=True)
    assert offset is None
    xhat = asymq.fake_quantize_symmetric_max(x, high, bits=bits)
    assert torch.equal(asymq.fake_quantize_symmetric_max(-x, high, bits=bits), -xhat)
    assert torch.equal(asymq.fake_quantize_symmetric_max(xhat, high, bits=bits), xhat)
    assert (xhat.diff() >= 0).all()
    codes = asymq.quantize(x, scale, bits=bits)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(asymq.dequantize(codes, scale, bits=bits), xhat)


@FEW
@given(BITS, END, WIDTH, PLACES, st.integers(-8, 8))
def test_powers_of_two_change_nothing(bits, low, width, places, exponent):
    """Scaling x and the range by 2^i scales x̂ and leaves the gradients as they are."""
    factor = 2.0**exponent
    x, low, high = _inputs(low, width, places, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, low, high)]
    scaled = [(t * factor).requires_grad_() for t in (x, low, high)]
    xhat = asymq.fake_quantize_min_max(*leaves, bits=bits)
    xhat_scaled = asymq.fake_quantize_min_max(*scaled, bits=bits)
    assert torch.equal(xhat_scaled, xhat * factor)
    for a, b in zip(
        torch.autograd.grad(xhat.sum(), leaves),
        torch.autograd.grad(xhat_scaled.sum(), scaled),
        strict=True,
    ):
        assert torch.equal(a, b)


@FEW
@given(BITS, END, WIDTH, PLACES)
def test_parameterizations_agree(bits, low, width, places):
    """β = γ = 1 is min/max; scale and offset of a range give its x̂."""
    x, low, high = _inputs(low, width, places, torch.float32)
    one = torch.ones_like(low)
    expected = asymq.fake_quantize_min_max(x, low, high, bits=bits)
    beta_gamma = asymq.fake_quantize_beta_gamma(x, one, one, low, high, bits=bits)
    assert torch.equal(beta_gamma, expected)
    scale, offset = asymq.effective_scale_offset("min_max", low, high, bits=bits)
    assert torch.equal(asymq.fake_quantize_scale_offset(x, scale, offset, bits=bits), expected)


# ---- live ranges -------------------------------------------------------------------------------

FACTOR = st.floats(0.25, 2, width=32)
GROUPS = st.lists(
    st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=2, max_size=8
).filter(lambda groups: len(groups) % 2 == 0)


def _live(x, beta, gamma, bits, symmetric, group=4, eps=1e-8):
    options = {"group": group, "bits": bits, "eps": eps}
    if symmetric:
        return asymq.fake_quantize_dynamic_symmetric_gamma(x, gamma, **options)
    return asymq.fake_quantize_dynamic_beta_gamma(x, beta, gamma, **options)


def _tokens(groups):
    """Of two groups each."""
    return torch.tensor(groups).reshape(-1, 8)


@FEW
@given(BITS, GROUPS, FACTOR, FACTOR, st.booleans())
def test_a_live_range_is_that_of_its_group(bits, groups, beta, gamma, symmetric):
    """No group knows another: alone, in another order, beside others it becomes the same."""
    x, beta, gamma = _tokens(groups), torch.tensor([beta]), torch.tensor([gamma])
    xhat = _live(x, beta, gamma, bits, symmetric)
    assert torch.equal(_live(x.flip(0), beta, gamma, bits, symmetric), xhat.flip(0))
    alone = _live(x.reshape(-1, 4), beta, gamma, bits, symmetric, group=None)
    assert torch.equal(alone.reshape(x.shape), xhat)
    if symmetric:
        assert torch.equal(_live(-x, beta, gamma, bits, symmetric), -xhat)


@FEW
@given(BITS, GROUPS, FACTOR, FACTOR, st.booleans(), st.integers(-8, 8))
def test_live_ranges_scale(bits, groups, beta, gamma, symmetric, exponent):
    """2^i x becomes 2^i x̂ where no scale is held by eps, with gradients to match."""
    factor = 2.0**exponent
    results = []
    for x in (_tokens(groups), _tokens(groups) * factor):
        leaves = [t.requires_grad_() for t in (x, torch.tensor([beta]), torch.tensor([gamma]))]
        xhat = _live(*leaves, bits, symmetric, eps=1e-30)
        if symmetric:
            del leaves[1]
        results.append((xhat, *torch.autograd.grad(xhat.sum(), leaves)))
    (xhat, d_x, *d_factors), (scaled, d_x_scaled, *d_factors_scaled) = results
    assert torch.equal(scaled, factor * xhat) and torch.equal(d_x_scaled, d_x)
    for a, b in zip(d_factors, d_factors_scaled, strict=True):
        assert torch.equal(b, factor * a)


@FEW
@given(BITS, GROUPS, st.booleans())
def test_a_live_range_holds_its_group(bits, groups, symmetric):
    """With factors of 1 an element is half a step off, or a whole one where the range is rounded to
    its grid; zero stays zero, and every element keeps its side."""
    x, one = _tokens(groups), torch.ones(1)
    xhat = _live(x, one, one, bits, symmetric)
    parts = x.reshape(-1, 4)
    low, high = parts.amin(1).clamp(max=0), parts.amax(1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        scale = (high - low) / (2**bits - 1)
    error = (xhat - x).abs().reshape(-1, 4).amax(1)
    most = 0.5 if symmetric else 1.0
    assert (error <= most * scale.clamp(min=1e-8) + 1e-5 * torch.maximum(-low, high)).all()
    assert (xhat[x == 0] == 0).all() and (xhat * x >= 0).all()
