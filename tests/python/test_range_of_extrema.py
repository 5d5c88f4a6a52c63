"""First ranges from data: range_of_extrema against the reference and by worked numbers."""

from __future__ import annotations

import pytest
import torch
from compare import assert_bit_equal

from asymq import reference
from asymq.ops import range_of_extrema

pytestmark = pytest.mark.composite

EXTREMA = torch.tensor(
    [
        (-1.0, 3.0),
        (-4.0, 3.0),
        (1.0, 2.0),
        (-2.0, -1.0),
        (2.0, 2.0),
        (-3.0, -3.0),
        (0.0, 0.0),
        (1.0, 1.0000005),
        (0.0, 2e-7),
        (-1e-9, 1e-9),
        (-3e-38, 0.0),
        (-3e38, 3e38),
        (torch.nan, torch.nan),
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("force_zero", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_reference(dtype, symmetric, force_zero, bits, device):
    ends = EXTREMA.to(device, dtype).unbind(1)
    full_range = {"full_range": True, "eps": 1e-3}
    for options in ({}, {"fallback": 0.25, "eps": 1e-3}, *([full_range] if symmetric else [])):
        options |= {"bits": bits, "symmetric": symmetric, "force_zero": force_zero}
        expected = reference.range_of_extrema(*ends, **options)
        for a, e in zip(range_of_extrema(*ends, **options), expected, strict=True):
            assert_bit_equal(a, e)


def test_worked_numbers(device):
    def call(*ends, **options):
        tensors = (torch.tensor([end], device=device) for end in ends)
        low, high, without_width = range_of_extrema(*tensors, bits=4, **options)
        return low.item(), high.item(), without_width.item()

    assert call(1.0, 2.0) == (0.0, 2.0, False)
    assert call(1.0, 2.0, force_zero=False) == (1.0, 2.0, False)
    assert call(2.0, 2.0, force_zero=False) == (0.0, 2.0, False)
    assert call(-1.0, 2.0, symmetric=True) == (-2.0, 2.0, False)
    assert call(0.0, 0.0) == (-1.0, 1.0, True)
    assert call(0.0, 0.0, symmetric=True, fallback=0.5) == (-0.5, 0.5, True)
    # 15 steps of eps.
    assert call(0.0, 0.125, eps=0.125) == (0.0, 1.875, True)
    assert call(-0.125, 0.0, eps=0.125, symmetric=True) == (-0.9375, 0.9375, True)
    assert call(-0.125, 0.0, eps=0.125, symmetric=True, full_range=True) == (-1.0, 1.0, True)


def test_no_width_no_step(device):
    """What comes out is as wide as the least scale at least, so that all of it learns."""
    for symmetric in (True, False):
        low, high, _ = range_of_extrema(
            *EXTREMA[:-1].to(device).unbind(1), bits=8, symmetric=symmetric
        )
        assert (high - low >= 255 * 1e-8 * (1 - 1e-6)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric, device):
    ends = [e.float().requires_grad_() for e in EXTREMA[:-1].to(device).unbind(1)]
    for force_zero in (True, False):
        torch.library.opcheck(
            torch.ops.asymq.range_of_extrema.default,
            (*ends, 8),
            {"symmetric": symmetric, "force_zero": force_zero},
        )
    assert not any(t.requires_grad for t in range_of_extrema(*ends, bits=8))


def test_meta():
    ends = (torch.empty(5, 1, device="meta") for _ in range(2))
    low, high, without_width = range_of_extrema(*ends, bits=8)
    assert low.shape == high.shape == without_width.shape == (5, 1)
    assert without_width.dtype == torch.bool


def test_errors(device):
    one = torch.ones(1, device=device)
    for message, ends, options in (
        ("bits must be between 2 and 16, got 1", (one, one), {"bits": 1}),
        ("fallback must be positive and finite, got 0", (one, one), {"bits": 8, "fallback": 0.0}),
        ("eps must be positive and finite, got inf", (one, one), {"bits": 8, "eps": torch.inf}),
        ("min must be float32 or float64, got Half", (one.half(), one.half()), {"bits": 8}),
        ("max must have min's dtype", (one, one.double()), {"bits": 8}),
        (r"max must have min's shape \[1\], got \[2\]", (one, one.expand(2)), {"bits": 8}),
    ):
        with pytest.raises(RuntimeError, match=f"asymq::range_of_extrema: {message}"):
            range_of_extrema(*ends, **options)
