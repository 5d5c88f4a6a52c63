"""Quantized attention against the composition of our own operators in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import fused
import pytest
import torch
from fused import (
    assert_compiles,
    assert_no_second_derivative,
    assert_repeatable,
    assert_takes_expanded_gradient,
    assert_transforms_say_so,
    assert_wanted_gradients_alone,
    flat,
    opcheck_private,
    quantizer,
)
from samples import PARAMETERIZATIONS
from torch import Tensor

from asymq.ops import quantized_attention, quantized_softmax

pytestmark = pytest.mark.composite

HALVES = (torch.bfloat16, torch.float16)
SCORES = (-1.5, 2.0)  # narrower than what comes out, so that some is clipped
PROBABILITIES = (0.0, 0.6)


@dataclass(frozen=True)
class Case:
    queries: int = 40
    keys: int = 40
    width: int = 64
    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    dtype: torch.dtype = torch.float32
    mask: str = "none"
    window: int | None = None
    scores: str = "min_max"  # rows of samples.PARAMETERIZATIONS
    probabilities: str = "min_max"
    layout: str = "heads inside"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.queries}x{self.keys}x{self.width}-{self.heads}of{self.key_heads}"
        window = f"window{self.window}-" if self.window else ""
        parts = (sizes, dtype, self.mask, window + self.scores, self.probabilities, self.layout)
        return "-".join(parts).replace(" ", "_")


DTYPES = (torch.float32, *HALVES)
MASKS = ("bool", "added", "padding")
CASES = [
    *(
        Case(dtype=dtype, mask="causal", queries=n, keys=n)
        for dtype in DTYPES
        for n in (1, 64, 130)
    ),
    *(Case(dtype=dtype, mask=m, keys=70) for dtype in DTYPES for m in MASKS),
    *(
        Case(dtype=dtype, width=width, key_heads=1, queries=70, keys=90)
        for dtype in DTYPES
        for width in (8, 32, 40, 80, 96, 128)
    ),
    *(Case(dtype=dtype, queries=q, keys=k) for dtype in DTYPES for q, k in ((1, 77), (5, 1))),
    *(
        Case(dtype=dtype, mask="causal", window=window, queries=q, keys=k, heads=4)
        for dtype in (torch.float32, torch.bfloat16)
        for window, q, k in ((1, 66, 66), (30, 70, 200), (None, 33, 100), (None, 9, 4))
    ),
    *(
        Case(dtype=torch.bfloat16, mask="causal", window=window, queries=70, keys=70)
        for window in (71, 2**31 - 1, 2**40)
    ),
    *(Case(scores=name, probabilities=name, mask="causal") for name in PARAMETERIZATIONS),
    *(Case(layout=name, dtype=torch.bfloat16) for name in ("dense", "sliced", "offset")),
    # What no kernel takes.
    Case(width=160),
    Case(width=12, dtype=torch.bfloat16),
    Case(dtype=torch.float64, mask="causal", key_heads=1),
]


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request, device):
    """float32 in both of its ways; without a GPU, whose products there are, in one."""
    if request.param and device.type != "cuda":
        pytest.skip("TF32 is a GPU's")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


def in_layout(layout: str, shape: tuple[int, ...], device) -> Tensor:
    batch, heads, tokens, width = shape
    if layout == "heads inside":
        return torch.randn(batch, tokens, heads, width, device=device).transpose(1, 2)
    return fused.in_layout(layout, shape, device)


def make_mask(case: Case, device) -> Tensor | None:
    if case.mask == "bool":
        mask = torch.rand(case.batch, 1, case.queries, case.keys, device=device) < 0.6
        mask[0, :, 3] = False  # a query without any key
        return mask
    if case.mask == "padding":
        mask = torch.ones(case.batch, 1, 1, case.keys, dtype=torch.bool, device=device)
        mask[0, ..., case.keys // 3 :] = False
        return mask
    if case.mask == "added":
        mask = torch.randn(case.heads, case.queries, case.keys, device=device)
        return mask.masked_fill(torch.rand_like(mask) < 0.3, -1e9)
    return None


@dataclass(frozen=True)
class Call:
    """A call's arguments."""

    heads: list[Tensor]  # query, key, value
    mask: Tensor | None
    ranges: list
    sight: dict[str, Any]

    def __call__(self) -> Tensor:
        return quantized_attention(*self.heads, self.mask, *self.ranges, **self.sight)

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.heads, *self.learned(self.ranges)]

    @staticmethod
    def learned(ranges) -> list[Tensor]:
        return [t for r in ranges for t in r.parameters if t.requires_grad]


def make(case: Case, device) -> Call:
    shapes = [
        (case.batch, heads, tokens, case.width)
        for heads, tokens in (
            (case.heads, case.queries),
            (case.key_heads, case.keys),
            (case.key_heads, case.keys),
        )
    ]
    heads = [in_layout(case.layout, s, device).to(case.dtype).requires_grad_() for s in shapes]
    ranges = [
        quantizer(case.scores, *SCORES, torch.float32, device),
        quantizer(case.probabilities, *PROBABILITIES, torch.float32, device),
    ]
    sight = {"causal": case.mask == "causal", "window": case.window}
    return Call(heads, make_mask(case, device), ranges, sight)


def has_kernel(case: Case, tf32: bool, device) -> bool:
    fits = case.width <= 128 and case.width * case.dtype.itemsize % 16 == 0
    return device.type == "cuda" and fits and (case.dtype in HALVES or tf32)


def compose(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """In this dtype: the context, the probabilities and the scores."""
    query, key, value = (t.to(dtype) for t in call.heads)
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    probabilities = quantized_softmax(scores, mask, *call.ranges, **call.sight)
    return probabilities @ value, probabilities, scores


def assert_near(actual: Tensor, expected: Tensor, scale: float, tolerance: float) -> None:
    assert actual.shape == expected.shape
    off = (actual.double() - expected.double()).norm().item()
    assert off <= tolerance * max(expected.double().norm().item(), scale), off


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_composition(case, tf32, device):
    if tf32 and case.dtype != torch.float32:
        pytest.skip("float32's")
    call = make(case, device)
    # A kernel does not round the scores: float64's are the ones to compare with.
    kernel = has_kernel(case, tf32, device)
    dtype = torch.float64 if kernel or case.dtype not in HALVES else case.dtype
    # Of a tensor's norm: rounding, and codes that it moves.
    bounds = {torch.float64: 1e-12, torch.float32: 8e-3 if tf32 else 1e-3, torch.float16: 2e-3}
    bound = bounds.get(case.dtype, 1e-2)
    actual = call()
    expected, probabilities, scores = compose(call, dtype)
    assert actual.dtype == case.dtype and actual.transpose(1, 2).is_contiguous()
    assert_near(actual, expected, 0, bound)
    grad = torch.randn(expected.shape, device=device).to(case.dtype)
    of_call = torch.autograd.grad(actual, call.leaves, grad)
    *wanted, of_probabilities, of_scores = torch.autograd.grad(
        expected, [*call.leaves, probabilities, scores], grad.to(dtype)
    )
    # Where a row has one key, gradients are 0 but for rounding.
    for a, e in zip(of_call[:3], wanted[:3], strict=True):
        assert a.dtype == case.dtype
        assert_near(a, e, 0.1 * grad.double().norm().item(), bound)
    # Sums whose terms cancel.
    totals = [t.abs().sum().item() for t in (of_scores, of_probabilities)]
    counts = [len(Call.learned([r])) for r in call.ranges]
    each = [total for total, n in zip(totals, counts, strict=True) for _ in range(n)]
    for a, e, total in zip(of_call[3:], wanted[3:], each, strict=True):
        assert_near(a, e, total, 2 * bound)


@pytest.mark.parametrize("mask", ["bool", "padding"])
def test_nothing_from_hidden_keys(mask, device):
    """Whatever they hold, and whatever a range makes of 0."""
    case = Case(mask=mask, dtype=torch.bfloat16, batch=1)
    call = make(case, device)
    low, high = (torch.tensor([v], device=device) for v in (0.05, 0.9))
    call.ranges[1] = call.ranges[1]._replace(parameters=(low, high))
    with torch.no_grad():
        hidden = ~call.mask.expand(1, case.heads, case.queries, case.keys).any(2)[0].all(0)
        expected = call()
        for tensor in call.heads[1:]:
            tensor[:, :, hidden] = 1e4
        assert hidden.any() or mask == "bool"
        assert torch.equal(call(), expected)


def test_query_without_keys(device):
    case = Case(mask="bool", dtype=torch.bfloat16)
    call = make(case, device)
    out = call()
    assert (out[0, :, 3] == 0).all()
    dquery, *others = torch.autograd.grad(out.square().sum(), call.leaves)
    assert (dquery[0, :, 3] == 0).all()
    assert all(g.isfinite().all() for g in others)


def test_infinite_gradient_of_a_query_without_keys(device):
    call = make(Case(mask="bool", dtype=torch.bfloat16), device)
    out = call()
    grad = torch.ones_like(out)
    grad[0, :, 3] = torch.inf
    leaves = [call.heads[0], *call.learned(call.ranges)]
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, grad))


def test_nan_stays_in_its_row(device):
    call = make(Case(dtype=torch.bfloat16, mask="causal"), device)
    with torch.no_grad():
        call.heads[0][0, 1, 5] = torch.nan
        out = call()
    nan = out.isnan().all(-1)
    assert nan[0, 1, 5] and nan.sum() == 1 and out.isnan().sum() == out.shape[-1]


def test_empty(device):
    for sizes in ({"batch": 0}, {"queries": 0}, {"keys": 0}):
        call = make(Case(**sizes), device)
        out = call()
        assert out.shape == call.heads[0].shape and (out == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), call.leaves))


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
def test_wanted_gradients_alone(wanted, device):
    """Any of query, key and value may be frozen, and ranges with them."""
    call = make(Case(mask="causal", dtype=torch.bfloat16), device)
    query, key, value = call.heads
    groups = [[query, *call.ranges[0].parameters], [key, *call.ranges[1].parameters], [value]]
    assert_wanted_gradients_alone(call, groups, wanted)


def test_repeatable(device):
    call = make(Case(queries=150, keys=150, mask="causal", dtype=torch.bfloat16), device)
    assert_repeatable(call, call.leaves)


def test_expanded_gradient(device):
    call = make(Case(mask="causal"), device)
    assert_takes_expanded_gradient(call, call.heads[0])


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(mask, dtype, device):
    call = make(Case(mask=mask, dtype=dtype, queries=8, keys=9, width=16, key_heads=1), device)
    ranges = (*flat(call.ranges[0]), *flat(call.ranges[1]))
    public = (*call.heads, call.mask, call.sight["causal"], 0.25, *ranges, call.sight["window"])
    torch.library.opcheck(torch.ops.asymq.quantized_attention.default, public)
    names = ["_quantized_attention.default", "_quantized_attention_backward.default"]
    opcheck_private(call, names)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic, device):
    call = make(Case(mask="causal", dtype=torch.bfloat16, queries=16, keys=16), device)
    _, key, value = call.heads
    assert_compiles(
        lambda x: quantized_attention(x, key, value, None, *call.ranges, **call.sight).clone(),
        call.leaves,
        backend,
        dynamic,
    )


def test_second_derivative_raises(device):
    call = make(Case(), device)
    assert_no_second_derivative(call(), call.heads[0], "_quantized_attention_backward")


def test_transforms_say_so(device):
    call = make(Case(), device)
    assert_transforms_say_so(
        lambda x: quantized_attention(x, *call.heads[1:], None, *call.ranges),
        call.heads[0],
        "quantized_attention",
    )


def bad_calls(device):
    (query, key, value), _, (s, p), _ = (
        getattr(make(Case(), device), name) for name in ("heads", "mask", "ranges", "sight")
    )
    yield "query must have 4 dimensions", (query[0], key, value, None, s, p)
    yield "value must have the query's dtype", (query, key, value.double(), None, s, p)
    yield "key must have the query's batch and width", (query, key[..., 1:], value, None, s, p)
    yield "multiple of the key's, got 2 and 0", (query, key[:, :0], value[:, :0], None, s, p)
    yield "value must have the key's batch, heads", (query, key, value[:, :, 1:], None, s, p)
    mask = torch.ones(3, 40, device=device)
    yield r"mask has shape \[3, 40\]", (query, key, value, mask, s, p)
    two = s._replace(parameters=tuple(t.detach().expand(2) for t in s.parameters))
    yield "scores' min_max: min must have one element", (query, key, value, None, two, p)


def test_errors(device):
    for message, call in bad_calls(device):
        with pytest.raises(RuntimeError, match=message):
            quantized_attention(*call)
    call = make(Case(), device)
    with pytest.raises(RuntimeError, match="window must be at least 1, with causal, got 3"):
        quantized_attention(*call.heads, None, *call.ranges, window=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", HALVES)
def test_scores_are_not_in_memory(dtype):
    case = Case(batch=1, heads=4, key_heads=4, queries=2048, keys=2048, mask="causal", dtype=dtype)
    call = make(case, torch.device("cuda"))
    torch.autograd.grad(call().sum(), call.leaves)  # what libraries allocate once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(call().sum(), call.leaves)
    of_scores = case.heads * case.queries * case.keys * 2
    assert torch.cuda.max_memory_allocated() - before < of_scores / 2
