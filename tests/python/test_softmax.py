"""The quantized softmax against the composition of our own operators."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import fused
import pytest
import torch
from compare import assert_bit_equal, assert_on_grid
from fused import (
    assert_compiles,
    assert_no_second_derivative,
    assert_range_gradient,
    assert_repeatable,
    assert_takes_expanded_gradient,
    assert_transforms_say_so,
    assert_wanted_gradients_alone,
    close,
    fake_quantize,
    flat,
    moved,
    named,
    opcheck_private,
    quantizer,
    scale_of,
    wide,
)
from samples import PARAMETERIZATIONS
from torch import Tensor

from asymq.ops import quantized_softmax

pytestmark = pytest.mark.composite

SCORES = (-6.0, 5.0)
PROBABILITIES = (0.0, 0.75)  # narrower than what comes out, so that some is clipped
WINDOW = 5
MASKS = ("none", "causal", "bool", "added", "causal and bool", "causal window")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (2, 3, 5, 33)
    dtype: torch.dtype = torch.float32
    mask: str = "none"
    scores: str = "min_max"  # rows of samples.PARAMETERIZATIONS
    probabilities: str = "beta_gamma"
    layout: str = "dense"
    range_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = ["x".join(map(str, self.shape)), dtype, self.mask.replace(" ", "_")]
        return "-".join([*parts, self.scores, self.probabilities, self.layout])


CASES = [
    *(Case(mask=mask, shape=shape) for mask in MASKS for shape in ((2, 3, 7, 33), (1, 2, 16, 64))),
    *(Case(shape=(1, 2, 3, keys), mask="causal") for keys in (1, 3, 31, 128, 1000, 1024)),
    # Longer than what a warp keeps in registers, with and without 16-byte accesses.
    *(Case(shape=(1, 1, 4, keys), mask=m) for keys in (1028, 1501) for m in ("causal", "bool")),
    *(Case(shape=(1, 1, 64, keys), mask="causal window") for keys in (64, 1092)),
    Case(shape=(1, 2, 9, 4), mask="causal window and bool"),
    Case(shape=(1, 1, 9, 4), mask="causal"),  # queries that see no key
    *(
        Case(dtype=dtype, mask=mask, shape=(2, 2, 9, 40))
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for mask in ("causal", "added")
    ),
    Case(dtype=torch.float64, range_dtype=torch.float64, mask="bool"),
    *(Case(scores=name, probabilities=name, mask="causal") for name in PARAMETERIZATIONS),
    Case(layout="transposed", mask="causal"),
    Case(layout="offset", shape=(1, 2, 3, 16)),
]


def make_mask(case: Case, device) -> Tensor | None:
    batch, _, queries, keys = case.shape
    if case.mask == "added":
        mask = torch.randn(batch, 1, queries, keys, device=device, dtype=case.dtype)
        lowest = torch.finfo(case.dtype).min
        for value in (lowest, max(-1e9, lowest), -1e4):
            mask.masked_fill_(torch.rand_like(mask) < 0.1, value)
        mask[0, :, 0] = torch.finfo(case.dtype).min  # a query without any key
        return mask
    if "bool" in case.mask:
        mask = torch.rand(batch, 1, queries, keys, device=device) < 0.7
        mask[0, :, -1] = False
        return mask
    return None


def inputs(case: Case, device):
    batch, heads, queries, keys = case.shape
    if case.layout == "transposed":
        scores = torch.randn(batch, queries, heads, keys, device=device).transpose(1, 2)
    elif case.layout == "offset":
        flat = torch.randn(batch * heads * queries * keys + 1, device=device)
        scores = flat[1:].view(case.shape)
    else:
        scores = torch.randn(case.shape, device=device)
    scores = (3 * scores).to(case.dtype).detach().requires_grad_()
    ranges = (
        quantizer(case.scores, *SCORES, case.range_dtype, device),
        quantizer(case.probabilities, *PROBABILITIES, case.range_dtype, device),
    )
    sight = {
        "causal": "causal" in case.mask,
        "window": WINDOW if "window" in case.mask else None,
    }
    return scores, make_mask(case, device), ranges, sight


def hides(mask: Tensor) -> Tensor:
    """-1e4 and less, as the mask's dtype has it."""
    return mask <= torch.tensor(-1e4, dtype=mask.dtype, device=mask.device)


def seen_keys(
    scores: Tensor, mask: Tensor | None, causal: bool, window: int | None = None
) -> Tensor:
    queries, keys = scores.shape[-2:]
    seen = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if causal:
        seen = seen & seen[0, 0].tril(keys - queries)
    if window is not None:
        seen = seen & seen.triu(keys - queries - window + 1)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else ~hides(mask))
    return seen


def compose(case: Case, scores: Tensor, mask: Tensor | None, ranges, sight):
    """Of our own operators, in the scores' dtype: (quantized probabilities, those before, quantized
    scores)."""
    seen = seen_keys(scores, mask, **sight)
    quantized = masked = fake_quantize(scores, case.scores, ranges[0])
    if mask is not None and mask.dtype != torch.bool:
        masked = masked + mask
    masked = masked.masked_fill(~seen, -torch.inf)
    any_seen = seen.any(-1, keepdim=True)
    raw = torch.softmax(masked.where(any_seen, 0), -1).where(seen, 0)
    return fake_quantize(raw, case.probabilities, ranges[1]).where(seen, 0), raw, quantized


def learned(case: Case, ranges) -> list[Tensor]:
    names = (case.scores, case.probabilities)
    return [t for n, r in zip(names, ranges, strict=True) for t in fused.learned(n, r)]


def widened(mask: Tensor | None) -> Tensor | None:
    """A mask for wide scores: what hides in a narrow dtype hides in theirs."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    result = mask.to(wide(mask.dtype))
    return result.masked_fill(hides(mask), torch.finfo(result.dtype).min)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_probabilities(case, device):
    scores, mask, ranges, sight = inputs(case, device)
    actual = quantized_softmax(scores, mask, *ranges, **sight)
    assert actual.dtype == case.dtype and actual.is_contiguous()
    wide_scores = scores.detach().to(wide(case.dtype))
    expected, raw, _ = compose(case, wide_scores, widened(mask), ranges, sight)
    scale = scale_of(ranges[1])
    if case.dtype in (torch.float32, torch.float64):
        quotient = raw.double() / scale.double()
        assert_on_grid(actual.detach(), expected.detach(), quotient, scale, ulps=2)
    else:
        # The one rounding to the narrow type at the end; ties may go either way.
        expected = expected.to(case.dtype)
        flips = (actual != expected).sum().item()
        assert flips <= max(1, actual.numel() // 1000)
        assert (actual.float() - expected.float()).abs().max() <= 1.01 * scale.item()
    assert (actual[~seen_keys(scores, mask, **sight)] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, device):
    scores, mask, ranges, sight = inputs(case, device)
    grad = torch.randn(case.shape, device=device).to(case.dtype)
    leaves = [scores, *learned(case, ranges)]
    actual = torch.autograd.grad(quantized_softmax(scores, mask, *ranges, **sight), leaves, grad)
    wide_scores = scores.to(wide(case.dtype))
    probabilities, _, quantized = compose(case, wide_scores, widened(mask), ranges, sight)
    *expected, upstream = torch.autograd.grad(
        probabilities, [*leaves, quantized], grad.to(wide(case.dtype))
    )
    half = case.dtype in (torch.bfloat16, torch.float16)
    close(actual[0], expected[0], 1e-2 if half else 1e-5)
    terms = [upstream.abs().sum(), grad.abs()[seen_keys(scores, mask, **sight)].float().sum()]
    lengths = [len(PARAMETERIZATIONS[name].learned) for name in (case.scores, case.probabilities)]
    of_terms = [term for term, n in zip(terms, lengths, strict=True) for _ in range(n)]
    for a, e, total in zip(actual[1:], expected[1:], of_terms, strict=True):
        assert_range_gradient(a, e, total)


def test_statistics(device):
    """What the backward computes probabilities from, against float64."""
    case = Case(shape=(2, 2, 30, 300), mask="causal")
    scores, mask, ranges, sight = inputs(case, device)
    with torch.no_grad():
        _, statistics = torch.ops.asymq._quantized_softmax(
            scores=scores,
            mask=None,
            causal=True,
            window=None,
            **named(case.scores, ranges[0], "scores_"),
            **named(case.probabilities, ranges[1], "probabilities_"),
        )
        quantized = fake_quantize(scores, case.scores, ranges[0])
    quantized = quantized.masked_fill(~seen_keys(scores, mask, **sight), -torch.inf)
    largest = quantized.amax(-1)
    assert_bit_equal(statistics[..., 0], largest)
    total = (quantized - largest[..., None]).double().exp().sum(-1)
    assert ((statistics[..., 1].double() - total).abs() <= 2 * 2**-23 * total).all()


def test_positive_lower_end_shows_no_future(device):
    scores = torch.randn(1, 1, 8, 8, device=device)
    ranges = [
        quantizer("min_max", low, high, torch.float32, device)
        for low, high in ((-4.0, 4.0), (0.05, 0.9))
    ]
    probabilities = quantized_softmax(scores, None, *ranges, causal=True)
    assert (probabilities.triu(1) == 0).all()
    assert (probabilities.tril() >= 0.04)[torch.ones(8, 8).tril().bool()[None, None]].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-1e4, -1e9, -torch.inf])
def test_what_hides_a_key(value, dtype, device):
    """Also under a range of probabilities that would lift it, and for scores of another dtype."""
    for scores_dtype in (torch.float32, dtype):
        scores = torch.randn(1, 1, 8, 8, device=device, dtype=scores_dtype).requires_grad_()
        ranges = [
            quantizer("min_max", low, high, torch.float32, device)
            for low, high in ((-4.0, 4.0), (0.02, 0.9))
        ]
        mask = torch.full((8, 8), value, device=device).to(dtype).triu(1)
        actual = quantized_softmax(scores, mask, *ranges)
        expected = quantized_softmax(scores, None, *ranges, causal=True)
        assert (actual.triu(1) == 0).all()
        assert_bit_equal(actual, expected)
        gradients = (torch.autograd.grad(out.square().sum(), scores) for out in (actual, expected))
        assert_bit_equal(*(g for (g,) in gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_are_scores(dtype, device):
    """ALiBi's, however large: what is above -1e4 is added, and the range decides what is 0."""
    scores = torch.zeros(1, 1, 1, 4, device=device, dtype=dtype)
    ranges = [
        quantizer("min_max", low, high, torch.float32, device)
        for low, high in ((-4.0, 4.0), (0.25, 0.75))
    ]
    bias = torch.tensor([0.0, -1.0, -100.0, -9900.0], device=device, dtype=dtype)
    probabilities = quantized_softmax(scores, bias, *ranges)
    assert (probabilities > 0.2).all()
    bias[3] = -1e4
    assert quantized_softmax(scores, bias, *ranges)[0, 0, 0, 3] == 0


def test_nan_is_hidden_by_the_mask_alone(device):
    scores = torch.randn(1, 1, 4, 4, device=device)
    scores[0, 0, 1, 3] = torch.nan  # in the future
    scores[0, 0, 2, 1] = torch.nan
    scores.requires_grad_()
    ranges = [
        quantizer("min_max", low, high, torch.float32, device)
        for low, high in ((-4.0, 4.0), (0.0, 1.0))
    ]
    probabilities = quantized_softmax(scores, None, *ranges, causal=True)
    assert probabilities[0, 0, 2, :3].isnan().all() and probabilities[0, 0, 2, 3] == 0
    others = probabilities[0, 0, [0, 1, 3]]
    assert others.isfinite().all()
    clean = scores.detach().clone()
    clean[0, 0, 1, 3] = clean[0, 0, 2, 1] = 0
    for x, finite in ((scores, False), (clean.requires_grad_(), True)):
        out = quantized_softmax(x, None, *ranges, causal=True)
        gradients = torch.autograd.grad(out.sum(), [x, *ranges[0].parameters])
        assert gradients[0][0, 0, 1].isfinite().all()
        assert bool(gradients[1].isfinite().all()) == finite


@pytest.mark.parametrize("window", [1, 7, 1030, 5000])
def test_window(window, device):
    """The same as a mask, also where a row holds more than a warp keeps; wide ones hide nothing."""
    scores, _, ranges, _ = inputs(Case(shape=(1, 2, 1100, 1100)), device)
    seen = seen_keys(scores[:, :1].detach(), None, True, window)
    results = []
    for mask, sight in ((seen, {}), (None, {"causal": True, "window": window})):
        out = quantized_softmax(scores, mask, *ranges, **sight)
        results.append((out, *torch.autograd.grad(out.square().sum(), [scores])))
    for a, b in zip(*results, strict=True):
        assert (a[~seen.expand_as(a)] == 0).all()
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7) or (a != b).float().mean() < 1e-4


def test_empty(device):
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        case = Case(shape=shape)
        scores, mask, ranges, sight = inputs(case, device)
        out = quantized_softmax(scores, mask, *ranges, **sight)
        assert out.shape == shape
        leaves = learned(case, ranges)
        assert all(g == 0 for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
def test_wanted_gradients_alone(wanted, device):
    """Any of scores, the scores' range and the probabilities' range may be frozen."""
    case = Case(mask="causal")
    scores, mask, ranges, sight = inputs(case, device)
    groups = ([scores], ranges[0].parameters, ranges[1].parameters[:2])
    assert_wanted_gradients_alone(
        lambda: quantized_softmax(scores, mask, *ranges, **sight), groups, wanted
    )


@pytest.mark.native
def test_repeatable(device):
    case = Case(shape=(2, 4, 64, 96), mask="causal")
    scores, mask, ranges, sight = inputs(case, device)
    assert_repeatable(
        lambda: quantized_softmax(scores, mask, *ranges, **sight),
        [scores, *learned(case, ranges)],
    )


def test_expanded_gradient(device):
    scores, mask, ranges, sight = inputs(Case(mask="causal"), device)
    assert_takes_expanded_gradient(
        lambda: quantized_softmax(scores, mask, *ranges, **sight), scores
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(mask, dtype, device):
    scores, mask, ranges, sight = inputs(Case(mask=mask, dtype=dtype), device)
    ranges_flat = (*flat(ranges[0]), *flat(ranges[1]))
    public = (scores, mask, sight["causal"], *ranges_flat, sight["window"])
    torch.library.opcheck(torch.ops.asymq.quantized_softmax.default, public)
    opcheck_private(
        lambda: quantized_softmax(scores, mask, *ranges, **sight),
        ["_quantized_softmax.default", "_quantized_softmax_backward.default"],
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic, device):
    case = Case(mask="causal")
    scores, mask, ranges, sight = inputs(case, device)
    assert_compiles(
        lambda x: quantized_softmax(x, mask, *ranges, **sight).clone(),
        [scores, *learned(case, ranges)],
        backend,
        dynamic,
    )


def test_second_derivative_raises(device):
    scores, mask, ranges, sight = inputs(Case(), device)
    out = quantized_softmax(scores, mask, *ranges, **sight)
    assert_no_second_derivative(out, scores, "_quantized_softmax_backward")


def test_transforms_say_so(device):
    scores, mask, ranges, sight = inputs(Case(), device)
    assert_transforms_say_so(
        lambda x: quantized_softmax(x, mask, *ranges, **sight), scores, "quantized_softmax"
    )


def bad_calls(device):
    scores, _, (s, p), _ = inputs(Case(shape=(2, 3, 5, 8)), device)
    one = torch.ones(1, device=device)
    yield "scores must have 4 dimensions", (scores[0], None, s, p)
    yield "scores must be float32", (scores.long(), None, s, p)
    yield "mask must be bool", (scores, torch.ones(5, 8, dtype=torch.long, device=device), s, p)
    yield r"mask has shape \[4, 8\]", (scores, torch.ones(4, 8, device=device), s, p)
    yield (
        "mask must not require grad",
        (
            scores,
            torch.ones(5, 8, device=device, requires_grad=True),
            s,
            p,
        ),
    )
    two = s._replace(parameters=tuple(t.detach().expand(2) for t in s.parameters))
    yield r"scores' min_max: min must have one element, got shape \[2\]", (scores, None, two, p)
    yield (
        "min_max needs the parameter max",
        (
            scores,
            None,
            s._replace(parameters=s.parameters[:1]),
            p,
        ),
    )
    yield (
        "min_max needs 2 parameters, got 3",
        (
            scores,
            None,
            s._replace(parameters=(*s.parameters, one)),
            p,
        ),
    )
    yield (
        "probabilities' beta_gamma: bits must be between 2 and 16, got 17",
        (
            scores,
            None,
            s,
            p._replace(bits=17),
        ),
    )
    yield (
        "parameterization must be scale_offset",
        (
            scores,
            None,
            s._replace(parameterization="range"),
            p,
        ),
    )
    wide_ranges = [
        r._replace(parameters=tuple(t.detach().double() for t in r.parameters)) for r in (s, p)
    ]
    yield "scores' min_max: min must be float32, got Double", (scores, None, *wide_ranges)
    mixed = (scores.double(), None, wide_ranges[0], p)
    yield "must have the dtype of the scores' Double, got Float", mixed
    constant = (*p.parameters[:3], one.clone().requires_grad_())
    yield (
        "beta_gamma: max must not require grad",
        (
            scores,
            None,
            s,
            p._replace(parameters=constant),
        ),
    )


def test_errors(device):
    for message, call in bad_calls(device):
        with pytest.raises(RuntimeError, match=message):
            quantized_softmax(*call)
    scores, mask, ranges, _ = inputs(Case(), device)
    for sight in ({"window": 3}, {"window": 0, "causal": True}):
        with pytest.raises(RuntimeError, match="window must be at least 1, with causal, got"):
            quantized_softmax(scores, mask, *ranges, **sight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mask", MASKS)
def test_cuda_agrees_with_cpu(mask):
    case = Case(shape=(2, 3, 40, 1100), mask=mask)
    scores, mask, ranges, sight = inputs(case, torch.device("cpu"))

    def step(scores, mask, ranges):
        out = quantized_softmax(scores, mask, *ranges, **sight)
        return out, *torch.autograd.grad(out.square().sum(), [scores, *learned(case, ranges)])

    on_gpu = [moved(r, "cuda") for r in ranges]
    gpu = step(
        scores.detach().cuda().requires_grad_(), None if mask is None else mask.cuda(), on_gpu
    )
    cpu = step(scores, mask, ranges)
    flips = (gpu[0].cpu() != cpu[0]).sum().item()
    assert flips <= cpu[0].numel() // 1000
    for a, e in zip(gpu[1:], cpu[1:], strict=True):
        close(a.cpu(), e, 1e-4)
