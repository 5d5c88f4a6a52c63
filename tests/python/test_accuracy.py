"""Accuracy of the sums where rounding errors cannot cancel, and their bitwise repeatability."""

import dataclasses
import math

import pytest
import torch
from compare import assert_bit_equal
from samples import DynamicSample, Sample

import asymq

ROWS = [
    ((1,), (1,)),
    ((255,), (1,)),
    ((256,), (1,)),
    ((1000,), (1,)),
    ((4097,), (1,)),
    ((65_537,), (1,)),
    ((1_000_003,), (1,)),
    ((20_000_000,), (1,)),
    ((3, 1_000_003), (3, 1)),
    ((26_000, 768), (26_000, 1)),
    ((26_000, 768), (1, 768)),
    ((26_000, 768), (26_000, 6)),
    ((1_000_003, 4), (1, 4)),
    ((1_000_000, 6), (4, 1)),
    ((1000, 2000), (4, 5)),
    ((8, 500, 4, 300), (1, 500, 1, 300)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape, ranges", ROWS, ids=str)
def test_sums_of_constant_terms(shape, ranges, dtype, device):
    """1e-6 Σ|terms| for each of G_in, G_lo and G_up, all terms being equal."""
    scale = torch.full(ranges, 0.1, device=device, requires_grad=True)
    offset = torch.full(ranges, -7.0, device=device, requires_grad=True)
    count = math.prod(shape) // math.prod(ranges)
    g = torch.tensor(0.3, dtype=dtype, device=device)

    def sums(value):
        x = torch.tensor(value, dtype=dtype, device=device).repeat(shape)
        xhat = asymq.fake_quantize_scale_offset(x, scale, offset, bits=4)
        grads = torch.autograd.grad(xhat, (scale, offset), g.expand(shape))
        return x.flatten()[0], *(grad.double() for grad in grads)

    x, d_scale, d_offset = sums(0.53)
    # The quotient is float32's; the difference is exact.
    quotient = (x.float() / scale.detach().flatten()[0]).double()
    term = g.double() * (quotient.round() - quotient)
    assert ((d_scale - count * term).abs() <= 1e-6 * count * term.abs()).all()
    assert (d_offset == 0).all()

    for value in (-50.0, 50.0):
        _, _, d_offset = sums(value)
        expected = count * g.double() * scale.detach().double()
        assert ((d_offset - expected).abs() <= 1e-6 * expected).all()


def rounded_down_every_time(count):
    """float32 terms near 1 whose float32 running sum is rounded down by the most at every step."""
    terms, total = [], torch.zeros((), dtype=torch.float32)
    candidates = 1 + torch.arange(-64, 64) * 2.0**-23
    for _ in range(count):
        sums = total + candidates
        lost = total.double() + candidates.double() - sums.double()
        terms.append(candidates[lost.argmax()])
        total = total + terms[-1]
    return torch.stack(terms)


@pytest.mark.parametrize("ranges", [(1,), (1, 32), (64, 1)], ids=str)
@pytest.mark.parametrize("kind", ["worst constant", "worst terms"])
def test_sums_of_terms_that_all_round_one_way(kind, ranges, device):
    """The same bound for terms chosen against short float32 sums."""
    terms = torch.full((64,), 1.939434) if kind == "worst constant" else rounded_down_every_time(64)
    g = terms[:, None].expand(64, 32).contiguous().to(device)
    x = torch.full((64, 32), 50.0, device=device)
    low = torch.full(ranges, -1.0, device=device, requires_grad=True)
    high = torch.full(ranges, 1.0, device=device, requires_grad=True)
    xhat = asymq.fake_quantize_min_max(x, low, high, bits=8)
    _, d_high = torch.autograd.grad(xhat, (low, high), g)
    # Above the range every term is multiplied by 1 + ζ/k, ζ = rint(z) - z.
    _, offset = asymq.effective_scale_offset("min_max", low, high, bits=8)
    zeta = offset.double().round() - offset.double()
    expected = (1 + zeta / 255) * g.double().sum_to_size(ranges)
    assert ((d_high.double() - expected).abs() <= 1e-6 * expected).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    "sample",
    [
        *(Sample(granularity=g) for g in ("one", "axis0", "last", "groups", "blocks_two")),
        *(DynamicSample(granularity=g) for g in ("token", "groups", "positions")),
    ],
    ids=str,
)
def test_bitwise_repeatable(sample, dtype, device):
    """Over runs, and on the CPU over numbers of threads."""
    sample = dataclasses.replace(sample, dtype=dtype, size="millions")
    x, learned, grad = sample.build(device)
    threads = torch.get_num_threads()

    def step():
        xhat = sample.call(asymq, x, *learned)
        return xhat, *torch.autograd.grad(xhat, (x, *learned), grad)

    expected = step()
    try:
        for count in (threads, 1, 2, 3, 7) if device.type == "cpu" else (threads,) * 5:
            torch.set_num_threads(count)
            for a, e in zip(step(), expected, strict=True):
                assert_bit_equal(a, e)
    finally:
        torch.set_num_threads(threads)
