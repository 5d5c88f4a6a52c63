"""The comparison itself: it must reject what is wrong."""

import pytest
import torch
from compare import assert_bit_equal, assert_on_grid, assert_sums, gather, spread

SCALE = torch.tensor(0.1, dtype=torch.float64)
STEPS = torch.arange(2000, dtype=torch.float64)


def test_bit_equal_accepts_equal_nan():
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    assert_bit_equal(x, x.clone())


@pytest.mark.parametrize(
    "actual, expected",
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])),
        (torch.tensor([float("nan")]), torch.tensor([0.0])),
        (torch.tensor([float("inf")]), torch.tensor([float("-inf")])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.tensor([1.0]), torch.tensor([[1.0]])),
    ],
)
def test_bit_equal_rejects(actual, expected):
    with pytest.raises(AssertionError):
        assert_bit_equal(actual, expected)


def test_grid_accepts_a_flip_on_a_tie():
    quotient = STEPS.clone()
    quotient[7] = 7.5
    actual = STEPS * SCALE
    actual[7] += SCALE
    assert_on_grid(actual, STEPS * SCALE, quotient, SCALE)
    quotient[7] += 5e-7  # one float32 ulp at 7.5
    assert_on_grid(actual, STEPS * SCALE, quotient, SCALE)


def _flip(steps, quotient, count=1):
    actual, quotients = STEPS * SCALE, STEPS.clone()
    actual[7 : 7 + count] += steps * SCALE
    quotients[7 : 7 + count] += quotient
    return actual, STEPS * SCALE, quotients, SCALE


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(_flip(1, 0.4), id="no tie"),
        pytest.param(_flip(1, 0.50001), id="not close enough to the tie"),
        pytest.param(_flip(2, 0.5), id="two steps"),
        pytest.param(_flip(0.5, 0.5), id="half a step"),
        pytest.param(_flip(float("nan"), 0.5), id="NaN"),
        pytest.param(_flip(1, 0.5, count=3), id="too many"),
    ],
)
def test_grid_rejects(case):
    with pytest.raises(AssertionError):
        assert_on_grid(*case)


def test_grid_rejects_a_missing_nan():
    expected = STEPS * SCALE
    expected[3] = float("nan")
    with pytest.raises(AssertionError):
        assert_on_grid(STEPS * SCALE, expected, STEPS, SCALE)


def test_sums():
    terms = torch.tensor([1000.0])
    assert_sums(torch.tensor([0.0009]), torch.tensor([0.0]), terms)
    for wrong in (0.0012, float("nan"), float("inf")):
        with pytest.raises(AssertionError):
            assert_sums(torch.tensor([wrong]), torch.tensor([0.0]), terms)
    with pytest.raises(AssertionError):
        assert_sums(torch.tensor([1e-8]), torch.tensor([0.0]), terms, exact=True)
    with pytest.raises(AssertionError):
        assert_sums(torch.tensor([0.0]), torch.tensor([float("nan")]), terms)


def test_spread_and_gather():
    ranges = torch.tensor([[1.0, 2.0]])
    assert spread(ranges, torch.Size((2, 4))).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
    assert gather(torch.ones(2, 4), torch.Size((1, 2))).tolist() == [[4, 4]]
    assert gather(torch.ones(2, 4), torch.Size(())).item() == 8
