"""The quantized cross-entropy against the composition of our own operators and torch's."""

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
    assert_transforms_say_so,
    assert_wanted_gradients_alone,
    close,
    fake_quantize,
    flat,
    in_layout,
    learned,
    moved,
    named,
    opcheck_private,
    quantizer,
    wide,
)
from samples import PARAMETERIZATIONS
from torch import Tensor
from torch.nn.functional import cross_entropy

from asymq.ops import quantized_cross_entropy

pytestmark = pytest.mark.composite

RANGE = (-5.0, 6.0)  # narrower than what comes, so that some is clipped


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int] = (7, 33)
    dtype: torch.dtype = torch.float32
    name: str = "min_max"  # row of samples.PARAMETERIZATIONS
    layout: str = "dense"
    range_dtype: torch.dtype = torch.float32
    ignore_index: int = -100

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join(["x".join(map(str, self.shape)), dtype, self.name, self.layout])


CASES = [
    # Rows that start where no 16-byte access can, and more classes than float sums may take.
    *(Case(shape=shape) for shape in ((5, 1), (3, 3), (4, 1000), (6, 4097), (2, 140_001))),
    *(
        Case(dtype=dtype, shape=shape)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for shape in ((5, 7), (6, 4099))
    ),
    Case(dtype=torch.float64, range_dtype=torch.float64),
    *(Case(name=name) for name in PARAMETERIZATIONS),
    *(Case(layout=layout) for layout in ("transposed", "offset")),
    Case(ignore_index=3),
]


def inputs(case: Case, device):
    rows, classes = case.shape
    logits = in_layout(case.layout, case.shape, device)
    labels = torch.randint(classes, (rows,), device=device)
    if rows > 1:
        labels[rows // 2] = case.ignore_index
    range_ = quantizer(case.name, *RANGE, case.range_dtype, device)
    return (3 * logits).to(case.dtype).detach().requires_grad_(), labels, range_


def compose(case: Case, logits: Tensor, labels: Tensor, range_):
    quantized = fake_quantize(logits, case.name, range_)
    losses = cross_entropy(quantized, labels, ignore_index=case.ignore_index, reduction="none")
    return losses, quantized


def leaves(case: Case, logits: Tensor, range_) -> list[Tensor]:
    return [logits, *learned(case.name, range_)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses(case, device):
    logits, labels, range_ = inputs(case, device)
    actual = quantized_cross_entropy(logits, labels, range_, ignore_index=case.ignore_index)
    expected, _ = compose(case, logits.detach().to(wide(case.dtype)), labels, range_)
    assert actual.dtype == wide(case.dtype) and actual.shape == labels.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual[labels == case.ignore_index] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, device):
    logits, labels, range_ = inputs(case, device)
    grad = torch.randn(len(labels), device=device, dtype=wide(case.dtype))
    actual = torch.autograd.grad(
        quantized_cross_entropy(logits, labels, range_, ignore_index=case.ignore_index),
        leaves(case, logits, range_),
        grad,
    )
    losses, quantized = compose(case, logits.to(wide(case.dtype)), labels, range_)
    *expected, upstream = torch.autograd.grad(
        losses, [*leaves(case, logits, range_), quantized], grad
    )
    half = case.dtype in (torch.bfloat16, torch.float16)
    close(actual[0], expected[0], 1e-2 if half else 1e-5)
    assert (actual[0][labels == case.ignore_index] == 0).all()
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_range_gradient(a, e, upstream.abs().sum())


def test_statistics(device):
    """What the backward computes probabilities from, against float64."""
    case = Case(shape=(4, 3000))
    logits, labels, range_ = inputs(case, device)
    with torch.no_grad():
        _, statistics = torch.ops.asymq._quantized_cross_entropy(
            logits=logits,
            labels=labels,
            ignore_index=-100,
            classes=None,
            **named(case.name, range_),
        )
        quantized = fake_quantize(logits, case.name, range_)
    seen = labels != -100
    largest = quantized.amax(-1)
    assert torch.equal(statistics[seen, 0], largest[seen])
    log_sum = (quantized - largest[:, None]).double().exp().sum(-1).log()
    close(statistics[seen, 1].double(), log_sum[seen], 1e-6)


def test_not_finite(device):
    """A NaN shows in its row alone; infinities saturate on the grid."""
    logits, labels, range_ = inputs(Case(shape=(4, 50)), device)
    with torch.no_grad():
        logits[0, 5], logits[1, 5], logits[3, 6] = torch.nan, torch.inf, -torch.inf
    losses = quantized_cross_entropy(logits, labels, range_)
    assert losses[0].isnan() and losses[1:].isfinite().all()
    (gradient,) = torch.autograd.grad(losses[1:].sum(), logits)
    assert gradient[1:].isfinite().all()


def test_labels_that_are_no_class(device):
    logits, labels, range_ = inputs(Case(), device)
    labels[0] = 33
    if device.type == "cpu":
        with pytest.raises(IndexError, match="labels must be from 0 to 32 or ignore_index, got 33"):
            quantized_cross_entropy(logits, labels, range_)
        return
    losses = quantized_cross_entropy(logits, labels, range_)
    assert losses[0].isnan() and losses[1:].isfinite().all()
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient[0].isnan().any() and gradient[1:].isfinite().all()


def test_empty_and_all_ignored(device):
    for case in (Case(shape=(0, 5)), Case(shape=(3, 5))):
        logits, labels, range_ = inputs(case, device)
        labels.fill_(-100)
        losses = quantized_cross_entropy(logits, labels, range_)
        assert losses.shape == labels.shape and (losses == 0).all()
        for gradient in torch.autograd.grad(losses.sum(), leaves(case, logits, range_)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=2)))
def test_wanted_gradients_alone(wanted, device):
    logits, labels, range_ = inputs(Case(), device)
    assert_wanted_gradients_alone(
        lambda: quantized_cross_entropy(logits, labels, range_),
        ([logits], range_.parameters),
        wanted,
    )


@pytest.mark.native
def test_repeatable(device):
    case = Case(shape=(100, 5001))
    logits, labels, range_ = inputs(case, device)
    assert_repeatable(
        lambda: quantized_cross_entropy(logits, labels, range_), leaves(case, logits, range_)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    logits, labels, range_ = inputs(Case(dtype=dtype), device)
    public = (logits, labels, -100, *flat(range_))
    torch.library.opcheck(torch.ops.asymq.quantized_cross_entropy.default, public)
    opcheck_private(
        lambda: quantized_cross_entropy(logits, labels, range_),
        ["_quantized_cross_entropy.default", "_quantized_cross_entropy_backward.default"],
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic, device):
    case = Case()
    logits, labels, range_ = inputs(case, device)
    assert_compiles(
        lambda x: quantized_cross_entropy(x, labels, range_).clone(),
        leaves(case, logits, range_),
        backend,
        dynamic,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [1, 33, 1001])
def test_columns_behind_the_classes(classes, dtype, device):
    """They count for nothing, whatever they hold, and their gradient is 0."""
    case = Case(shape=(7, classes), dtype=dtype)
    logits, labels, range_ = inputs(case, device)
    wider = torch.full((7, classes + -classes % 8), torch.nan, device=device, dtype=dtype)
    wider[:, :classes] = logits.detach()
    wider.requires_grad_()

    def step(x, **options):
        losses = quantized_cross_entropy(x, labels, range_, **options)
        return losses, *torch.autograd.grad(losses.sum(), leaves(case, x, range_))

    losses, dlogits, *of_range = step(wider, classes=classes)
    expected, dexpected, *of_expected = step(logits)
    close(losses, expected, 1e-6)
    close(dlogits[:, :classes], dexpected, 1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert dlogits.shape == wider.shape and (dlogits[:, classes:] == 0).all()
    for a, e in zip(of_range, of_expected, strict=True):
        assert_range_gradient(a, e, torch.tensor(7.0))
    opcheck_private(
        lambda: quantized_cross_entropy(wider, labels, range_, classes=classes),
        ["_quantized_cross_entropy.default", "_quantized_cross_entropy_backward.default"],
    )


def test_second_derivative_raises(device):
    logits, labels, range_ = inputs(Case(), device)
    losses = quantized_cross_entropy(logits, labels, range_)
    assert_no_second_derivative(losses, logits, "_quantized_cross_entropy_backward")


def test_transforms_say_so(device):
    logits, labels, range_ = inputs(Case(), device)
    assert_transforms_say_so(
        lambda x: quantized_cross_entropy(x, labels, range_), logits, "quantized_cross_entropy"
    )


def test_errors(device):
    logits, labels, range_ = inputs(Case(), device)
    two = range_._replace(parameters=tuple(t.detach().expand(2) for t in range_.parameters))
    for message, call in (
        (r"logits must have 2 dimensions.* got shape \[33\]", (logits[0], labels, range_)),
        ("logits must be float32", (logits.long(), labels, range_)),
        ("logits must have at least one class", (logits[:, :0], labels, range_)),
        ("labels must be int64, got Int", (logits, labels.int(), range_)),
        (r"labels must have one element per row.*\[7\], got \[6\]", (logits, labels[1:], range_)),
        (r"min_max: min must have one element, got shape \[2\]", (logits, labels, two)),
        ("bits must be between 2 and 16, got 17", (logits, labels, range_._replace(bits=17))),
    ):
        with pytest.raises(RuntimeError, match="asymq::quantized_cross_entropy: .*" + message):
            quantized_cross_entropy(*call)
    for classes in (0, 34):
        with pytest.raises(RuntimeError, match=f"columns 33, got {classes}"):
            quantized_cross_entropy(logits, labels, range_, classes=classes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype):
    case = Case(shape=(40, 50257), dtype=dtype)
    logits, labels, range_ = inputs(case, torch.device("cpu"))

    def step(logits, labels, range_):
        losses = quantized_cross_entropy(logits, labels, range_)
        return losses, *torch.autograd.grad(losses.sum(), leaves(case, logits, range_))

    gpu = step(logits.detach().cuda().requires_grad_(), labels.cuda(), moved(range_, "cuda"))
    for a, e in zip(gpu, step(logits, labels, range_), strict=True):
        close(a.cpu(), e, 1e-2 if a.dtype == torch.bfloat16 else 1e-4)
