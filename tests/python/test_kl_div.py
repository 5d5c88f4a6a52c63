"""The quantized Kullback-Leibler divergence against the composition of our own operators and
torch's, and against golden values."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

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
    opcheck_private,
    quantizer,
    wide,
)
from samples import PARAMETERIZATIONS
from torch import Tensor

from asymq import quantized_kl_div
from asymq.ops import RangeArguments

pytestmark = pytest.mark.composite

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "train.json").read_text())["cases"]
RANGE = (-5.0, 6.0)  # narrower than what comes, so that some is clipped


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int] = (7, 33)
    dtype: torch.dtype = torch.float32
    name: str = "min_max"  # row of samples.PARAMETERIZATIONS
    layout: str = "dense"
    temperature: float = 1.0
    labels: bool = True
    range_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape))
        return "-".join([shape, dtype, self.name, self.layout, f"{self.temperature:g}"])

    def call(self, logits: Tensor, teacher: Tensor, labels: Tensor | None, range_) -> Tensor:
        options = {"labels": labels, "temperature": self.temperature}
        return quantized_kl_div(logits, teacher, range_, **options)


CASES = [
    # Rows that start where no 16-byte access can, and more classes than float sums may take.
    *(Case(shape=shape) for shape in ((5, 1), (3, 3), (6, 4097), (2, 140_001))),
    *(
        Case(dtype=dtype, shape=shape, temperature=2.5)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for shape in ((5, 7), (6, 4099))
    ),
    Case(dtype=torch.float64, range_dtype=torch.float64),
    *(Case(name=name, temperature=0.5) for name in PARAMETERIZATIONS),
    *(Case(layout=layout) for layout in ("transposed", "offset")),
    Case(labels=False),
]


def inputs(case: Case, device):
    rows, classes = case.shape

    def make() -> Tensor:
        return (3 * in_layout(case.layout, case.shape, device)).to(case.dtype).detach()

    labels = torch.randint(classes, (rows,), device=device)
    if rows > 1:
        labels[rows // 2] = -100
    range_ = quantizer(case.name, *RANGE, case.range_dtype, device)
    return make().requires_grad_(), make(), labels if case.labels else None, range_


def compose(case: Case, logits: Tensor, teacher: Tensor, labels: Tensor | None, range_):
    quantized = fake_quantize(logits, case.name, range_)
    student, of_teacher = (
        torch.log_softmax(x / case.temperature, -1) for x in (quantized, teacher.to(logits))
    )
    divergence = torch.nn.functional.kl_div(student, of_teacher, reduction="none", log_target=True)
    losses = case.temperature**2 * divergence.sum(-1)
    return losses if labels is None else losses.masked_fill(labels == -100, 0), quantized


def leaves(case: Case, logits: Tensor, range_) -> list[Tensor]:
    return [logits, *learned(case.name, range_)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients(case, device):
    logits, teacher, labels, range_ = inputs(case, device)
    grad = torch.randn(len(logits), device=device, dtype=wide(case.dtype))
    losses = case.call(logits, teacher, labels, range_)
    actual = torch.autograd.grad(losses, leaves(case, logits, range_), grad)
    wanted, quantized = compose(case, logits.to(wide(case.dtype)), teacher, labels, range_)
    *expected, upstream = torch.autograd.grad(
        wanted, [*leaves(case, logits, range_), quantized], grad
    )
    assert losses.dtype == wide(case.dtype) and losses.shape == logits.shape[:1]
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    close(actual[0], expected[0], 1e-2 if case.dtype in (torch.bfloat16, torch.float16) else 1e-5)
    if labels is not None:
        assert (losses[labels == -100] == 0).all() and (actual[0][labels == -100] == 0).all()
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_range_gradient(a, e, upstream.abs().sum())


@pytest.mark.parametrize("case", [c for c in GOLDEN if c["kind"] == "kl"], ids=str)
def test_golden(case, device):
    double = {"dtype": torch.float64, "device": device}
    logits = torch.tensor(case["x"], **double).requires_grad_()
    ends = [torch.tensor([case[end]], **double).requires_grad_() for end in ("min", "max")]
    losses = quantized_kl_div(
        logits,
        torch.tensor(case["teacher"], **double),
        RangeArguments("min_max", tuple(ends), case["bits"]),
        labels=torch.tensor(case["labels"], device=device),
        temperature=case["temperature"],
    )
    gradients = torch.autograd.grad(
        losses, [logits, *ends], torch.tensor(case["upstream"], **double)
    )
    expected = [case["loss"], case["grad_x"], [case["grad_min"]], [case["grad_max"]]]
    for a, e in zip((losses, *gradients), expected, strict=True):
        torch.testing.assert_close(
            a.cpu(), torch.tensor(e, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


def test_alike_logits_have_no_loss(device):
    """It is what its own size allows, not what the logits' does."""
    teacher = torch.randn(20, 5001, device=device) + 30
    range_ = quantizer("min_max", 20.0, 40.0, torch.float32, device, bits=16)
    losses = quantized_kl_div(teacher + 1e-3 * torch.randn_like(teacher), teacher, range_)
    assert (losses.abs() < 3e-6).all()


def test_not_finite(device):
    """A NaN shows in its row alone; a class that the teacher excludes adds nothing."""
    case = Case(shape=(4, 50), labels=False)
    logits, teacher, labels, range_ = inputs(case, device)
    with torch.no_grad():
        logits[0, 5], logits[1, 5], logits[3, 6] = torch.nan, torch.inf, -torch.inf
        teacher[2, 3] = -torch.inf
    losses = case.call(logits, teacher, labels, range_)
    assert losses[0].isnan() and losses[1:].isfinite().all()
    (gradient,) = torch.autograd.grad(losses[1:].sum(), logits)
    assert gradient[1:].isfinite().all()


def test_empty_and_all_ignored(device):
    for case in (Case(shape=(0, 5)), Case(shape=(3, 5))):
        logits, teacher, labels, range_ = inputs(case, device)
        labels.fill_(-100)
        losses = case.call(logits, teacher, labels, range_)
        assert losses.shape == labels.shape and (losses == 0).all()
        for gradient in torch.autograd.grad(losses.sum(), leaves(case, logits, range_)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=2)))
def test_wanted_gradients_alone(wanted, device):
    case = Case()
    logits, teacher, labels, range_ = inputs(case, device)
    groups = ([logits], range_.parameters)
    assert_wanted_gradients_alone(
        lambda: case.call(logits, teacher, labels, range_), groups, wanted
    )


@pytest.mark.native
def test_repeatable(device):
    case = Case(shape=(100, 5001))
    logits, teacher, labels, range_ = inputs(case, device)
    assert_repeatable(
        lambda: case.call(logits, teacher, labels, range_), leaves(case, logits, range_)
    )


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, labelled, device):
    case = Case(dtype=dtype, labels=labelled)
    logits, teacher, labels, range_ = inputs(case, device)
    public = (logits, teacher, labels, 2.0, -100, *flat(range_))
    torch.library.opcheck(torch.ops.asymq.quantized_kl_div.default, public)
    opcheck_private(
        lambda: case.call(logits, teacher, labels, range_),
        ["_quantized_kl_div.default", "_quantized_kl_div_backward.default"],
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    case = Case()
    logits, teacher, labels, range_ = inputs(case, device)
    assert_compiles(
        lambda x: case.call(x, teacher, labels, range_).clone(),
        leaves(case, logits, range_),
        backend,
        dynamic=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of_teacher", ["dense", "apart"])
def test_columns_behind_the_classes(of_teacher, dtype, device):
    """They count for nothing, whatever they hold, and their gradient is 0; the teacher's rows may
    be as far apart."""
    case = Case(shape=(7, 1001), dtype=dtype)
    logits, teacher, labels, range_ = inputs(case, device)

    def widened(x):
        wider = torch.full((7, 1008), torch.nan, device=device, dtype=dtype)
        wider[:, :1001] = x.detach()
        return wider

    wider = widened(logits).requires_grad_()
    apart = teacher if of_teacher == "dense" else widened(teacher)[:, :1001]

    def step(x, teacher, **options):
        losses = quantized_kl_div(x, teacher, range_, labels=labels, **options)
        return losses, *torch.autograd.grad(losses.sum(), leaves(case, x, range_))

    losses, dlogits, *of_range = step(wider, apart, classes=1001)
    expected, dexpected, *of_expected = step(logits, teacher)
    close(losses, expected, 1e-5)
    close(dlogits[:, :1001], dexpected, 1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert dlogits.shape == wider.shape and (dlogits[:, 1001:] == 0).all()
    for a, e in zip(of_range, of_expected, strict=True):
        assert_range_gradient(a, e, torch.tensor(7.0))
    opcheck_private(
        lambda: quantized_kl_div(wider, apart, range_, labels=labels, classes=1001),
        ["_quantized_kl_div.default", "_quantized_kl_div_backward.default"],
    )


def test_second_derivative_and_transforms_say_so(device):
    case = Case()
    logits, teacher, labels, range_ = inputs(case, device)
    losses = case.call(logits, teacher, labels, range_)
    assert_no_second_derivative(losses, logits, "_quantized_kl_div_backward")
    assert_transforms_say_so(
        lambda x: case.call(x, teacher, labels, range_), logits, "quantized_kl_div"
    )


def test_errors(device):
    logits, teacher, labels, range_ = inputs(Case(), device)
    two = (logits, teacher)
    for message, args, options in (
        (r"logits must have 2 dimensions.* got shape \[33\]", (logits[0], teacher[0]), {}),
        ("logits must be float32", (logits.long(), teacher.long()), {}),
        ("teacher_logits must have the logits' dtype Float", (logits, teacher.double()), {}),
        (
            r"teacher_logits must have the logits' shape \[7, 33\], got \[6",
            (logits, teacher[1:]),
            {},
        ),
        ("teacher_logits must not require grad.*detach", (logits, logits), {}),
        ("labels must be int64, got Int", two, {"labels": labels.int()}),
        (r"labels must have one element per row", two, {"labels": labels[1:]}),
        ("temperature must be positive and finite, got 0", two, {"temperature": 0.0}),
        ("temperature must be positive and finite, got inf", two, {"temperature": torch.inf}),
        ("classes must be between 1 and .* columns 33, got 34", two, {"classes": 34}),
        (r"teacher_logits must have the logits' shape \[7, 32\], got", two, {"classes": 32}),
    ):
        with pytest.raises(RuntimeError, match="asymq::quantized_kl_div: .*" + message):
            quantized_kl_div(*args, range_, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype):
    case = Case(shape=(40, 50257), dtype=dtype, temperature=2.0)
    logits, teacher, labels, range_ = inputs(case, torch.device("cpu"))

    def step(logits, teacher, labels, range_):
        losses = case.call(logits, teacher, labels, range_)
        return losses, *torch.autograd.grad(losses.sum(), leaves(case, logits, range_))

    gpu = step(
        logits.detach().cuda().requires_grad_(),
        teacher.cuda(),
        labels.cuda(),
        moved(range_, "cuda"),
    )
    for a, e in zip(gpu, step(logits, teacher, labels, range_), strict=True):
        close(a.cpu(), e, 1e-2 if a.dtype == torch.bfloat16 else 1e-4)
