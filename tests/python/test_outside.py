"""What other libraries expect of range learning, in our words and on their kinds of input."""

import pytest
import torch
from compare import assert_on_grid

import asymq

RANGES = [(-5.0, 0.0), (-5.0, 5.0), (0.0, 5.0)]


def _batch(low=-7.0, high=7.0, shape=(4, 3, 8, 8)):
    return (torch.rand(shape) * (high - low) + low).requires_grad_()


def _leaves(*values, shape=(1,)):
    return [torch.full(shape, v, requires_grad=True) for v in values]


def _quantize_dequantize(x, low, high, levels):
    """Scale and rounded offset from the ends, straight-through rounds, as AIMET's autograd test
    spells it out. Its gradients cancel in float32, where only its values are compared."""

    def ste(v):
        return v + (v.round() - v).detach()

    delta = (high - low) / levels
    offset = ste(low / delta)
    q = ste(x / delta) - offset
    inside = (q >= 0) & (q <= levels)
    q = torch.where(inside, q, q.detach().clamp(0, levels))
    return (q + offset) * delta


@pytest.mark.parametrize("low, high", RANGES)
def test_aimet_asymmetric_range_learning(low, high):
    x, ends = _batch(), _leaves(low, high)
    xhat = asymq.fake_quantize_min_max(x, *ends, bits=8)
    torch.testing.assert_close(xhat, _quantize_dequantize(x, *ends, 255), rtol=1e-6, atol=1e-6)

    leaves = [v.detach().double().requires_grad_() for v in (x, *ends)]
    actual = asymq.fake_quantize_min_max(*leaves, bits=8)
    expected = _quantize_dequantize(*leaves, 255)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("low, high", RANGES)
def test_aimet_end_points_and_mask(low, high):
    """The grid has 256 points, contains zero, and gradients of x stop at its ends."""
    x, (min_, max_) = _batch(), _leaves(low, high)
    xhat = asymq.fake_quantize_min_max(x, min_, max_, bits=8)
    (mask,) = torch.autograd.grad(xhat.sum(), x)
    step = (high - low) / 255
    assert (xhat.max() - xhat.min()).item() == pytest.approx(high - low, rel=1e-5)
    assert len(xhat.unique()) <= 256
    assert mask[(x > low + step) & (x < high - step)].all()
    assert not mask[(x < low - step) | (x > high + step)].any()
    zero = torch.zeros(1)
    assert asymq.fake_quantize_min_max(zero, min_, max_, bits=8).item() == 0


@pytest.mark.parametrize("high", [0.5, 5.0])
def test_aimet_symmetric_range_learning(high):
    """A single end: 255 levels for 8 bits, zero in the middle."""
    x, (max_,) = _batch(), _leaves(high)
    xhat = asymq.fake_quantize_symmetric_max(x, max_, bits=8)
    scale, _ = asymq.effective_scale_offset("min_max", max_, bits=8, symmetric=True)
    assert scale.item() == pytest.approx(2 * high / 255)
    assert xhat.max() == 127 * scale and xhat.min() == -127 * scale
    (grad,) = torch.autograd.grad(xhat.sum(), max_)
    with torch.no_grad():
        r = (x.double() / scale.double()).round()
        partial = torch.where(r.abs() > 127, 127 * r.sign(), r - x.double() / scale.double())
    assert grad.item() == pytest.approx(partial.sum().item() * 2 / 255, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize(
    "dtype, offset, lowest",
    [(torch.float32, -127.49999237060547, -127), (torch.float64, -127.5, -128)],
)
def test_aimet_tie_of_the_offset(dtype, offset, lowest):
    """(-5, 5) with 8 bits: on paper the offset is a tie, in float32 it is one ulp away, and only
    divisions that round correctly agree on which side."""
    ends = torch.tensor([-5.0, 5.0], dtype=dtype)
    scale, z = asymq.effective_scale_offset("min_max", *ends, bits=8)
    assert z.item() == offset
    xhat = asymq.fake_quantize_min_max(20 * ends, *ends, bits=8)
    assert (xhat / scale).round().tolist() == [lowest, lowest + 255]


@pytest.mark.parametrize("zero_point", [0, 1, 77, 255])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_torch_learnable_forward(axis, zero_point):
    """torch multiplies by 1/s: a step apart is allowed on ties alone."""
    x = _batch().detach()
    size = 1 if axis is None else x.shape[axis]
    scale = torch.linspace(0.02, 0.05, size)
    zeros = torch.full((size,), float(zero_point))
    if axis is None:
        expected = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zeros, 0, 255, 1.0)
        shape = (1,)
    else:
        expected = torch._fake_quantize_learnable_per_channel_affine(
            x, scale, zeros, axis, 0, 255, 1.0
        )
        shape = [size if i == axis else 1 for i in range(x.dim())]
    scale = scale.reshape(shape)
    actual = asymq.fake_quantize_scale_offset(x, scale, -zeros.reshape(shape), bits=8)
    assert_on_grid(actual, expected, x.double() / scale.double(), scale.expand_as(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [0, 3, 15])
def test_torch_learnable_backward(zero_point, bits):
    """With a power of two for a scale and non-negative zero points torch's gradients are right;
    the offset is the negative of the zero point."""
    x = _batch(-3, 3)
    scale, zeros = _leaves(2**-5, float(zero_point))
    expected = torch._fake_quantize_learnable_per_tensor_affine(
        x, scale, zeros, 0, 2**bits - 1, 1.0
    )
    expected_grads = torch.autograd.grad(expected.square().sum(), (x, scale, zeros))
    actual = asymq.fake_quantize_scale_offset(x, scale, -zeros, bits=bits)
    assert torch.equal(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual.square().sum(), (x, scale, zeros)), expected_grads, strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("index", [-9.0, -4.0, 0.0])
def test_nncf_low_and_range(index, channels, bits):
    """NNCF learns the lower end and the width. With the lower end on the grid its gradients are:
    of the low end, Σ g outside; of the width, Σ inside g (x̂ - x)/width + Σ above g."""
    width = torch.linspace(1.5, 4.0, channels).reshape(1, channels, 1, 1)
    low = (width / (2**bits - 1) * index).requires_grad_()
    width.requires_grad_()
    x = _batch(-5, 5, (4, channels, 8, 8))
    grad = torch.randn(x.shape)
    xhat = asymq.fake_quantize_min_max(x, low, low + width, bits=bits)
    grad_x, d_low, d_width = torch.autograd.grad(xhat, (x, low, width), grad)

    inside = grad_x != 0
    above = ~inside & (x > xhat)
    assert torch.equal(grad_x, torch.where(inside, grad, 0))
    error = grad * (xhat - x) / width
    expected = torch.where(inside, error, torch.where(above, grad, 0)).sum((0, 2, 3), keepdim=True)
    torch.testing.assert_close(d_width, expected, rtol=1e-4, atol=1e-4)
    expected = torch.where(inside, 0, grad).sum((0, 2, 3), keepdim=True)
    torch.testing.assert_close(d_low, expected, rtol=1e-4, atol=1e-4)


def test_nncf_symmetric_scale():
    """An input far outside contributes ±(k-1)/2 · g to the scale's gradient and nothing to x's."""
    x = torch.tensor([-100.0, 100.0, 0.5], requires_grad=True)
    (scale,) = _leaves(0.25)
    xhat = asymq.fake_quantize_symmetric_scale(x, scale, bits=4)
    grads = torch.autograd.grad(xhat, (x, scale), torch.tensor([2.0, 3.0, 5.0]))
    assert grads[0].tolist() == [0, 0, 5]
    assert grads[1].item() == 7 * (3 - 2)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 64), (128,), (16, 33, 5), (), (3, 0)])
def test_flaggems_shapes(shape):
    x = torch.randn(shape, requires_grad=True)
    scale, offset = _leaves(0.03, -120.0)
    xhat = asymq.fake_quantize_scale_offset(x, scale, offset, bits=8)
    expected = torch.fake_quantize_per_tensor_affine(x.detach(), 2**-5, 120, 0, 255)
    assert xhat.shape == expected.shape
    exact = asymq.fake_quantize_scale_offset(x, torch.full((1,), 2**-5), offset, bits=8)
    assert torch.equal(exact, expected)
    xhat.sum().backward()
    assert x.grad.shape == x.shape and scale.grad.shape == offset.grad.shape == (1,)
