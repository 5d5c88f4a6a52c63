"""What the tests of operators share that do more than quantize: quantizers with one range, and
comparisons."""

from __future__ import annotations

import pytest
import torch
from operator_calls import OperatorCalls
from samples import DYNAMIC, PARAMETERIZATIONS
from torch import Tensor

import asymq
from asymq import reference
from asymq.ops import RangeArguments

ROWS = PARAMETERIZATIONS | DYNAMIC


def quantizer(name: str, low: float, high: float, dtype, device, bits=8) -> RangeArguments:
    """Of a row of samples.PARAMETERIZATIONS or DYNAMIC, with leaves to learn: with the range low to
    high, or, of each token, with the factors that belong to that."""
    row = ROWS[name]
    symmetric = "symmetric" in name
    ends = (torch.full((1,), end, dtype=dtype, device=device) for end in (low, high))
    tensors = [t.clone() for t in row.from_range(*ends, 2**bits - 1)]
    for tensor in tensors[: len(row.learned)]:
        tensor.requires_grad_()
    family = {"scale": "scale_offset", "max": "min_max", "gamma": "beta_gamma"}
    function = row.function.removeprefix("dynamic_").removeprefix("symmetric_")
    parameterization = family[function] if symmetric else function
    return RangeArguments(
        parameterization,
        tuple(tensors),
        bits,
        symmetric,
        full_range=row.full_range,
        token=name in DYNAMIC,
        link=row.link,
    )


def in_layout(layout: str, shape: tuple[int, ...], device) -> Tensor:
    """Random values of a shape, "dense" or in memory as the name says."""
    if layout == "transposed":
        return torch.randn(shape[::-1], device=device).permute(*range(len(shape))[::-1])
    if layout == "offset":
        return torch.randn(torch.Size(shape).numel() + 1, device=device)[1:].view(shape)
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., ::2]
    if layout == "expanded":
        return torch.randn(1, *shape[1:], device=device).expand(shape)
    return torch.randn(shape, device=device)


def fake_quantize(x: Tensor, name: str, range_: RangeArguments) -> Tensor:
    row = ROWS[name]
    options: dict = {"link": row.link} if row.link != "identity" else {}
    options |= {"full_range": True} if row.full_range else {}
    options |= {"group": range_.group} if range_.token else {}
    function = getattr(asymq, f"fake_quantize_{row.function}")
    return function(x, *range_.parameters, bits=range_.bits, **options)


def learned(name: str, range_: RangeArguments) -> tuple[Tensor, ...]:
    return range_.parameters[: len(ROWS[name].learned)]


def scale_of(range_: RangeArguments) -> Tensor:
    scale, _ = asymq.effective_scale_offset(
        range_.parameterization,
        *range_.parameters,
        bits=range_.bits,
        symmetric=range_.symmetric,
        eps=range_.eps,
        full_range=range_.full_range,
        link=range_.link,
    )
    return scale


def moved(range_: RangeArguments, device) -> RangeArguments:
    """The same on another device, with leaves of its own."""
    tensors = (t.detach().to(device).requires_grad_(t.requires_grad) for t in range_.parameters)
    return range_._replace(parameters=tuple(tensors))


def flat(range_: RangeArguments | None) -> tuple:
    """As the public operators take it."""
    if range_ is None:
        range_ = RangeArguments("none", (), 8)
    return (range_.parameterization, list(range_.parameters), *range_[2:])


def named(name: str, range_: RangeArguments, whose: str = "") -> dict:
    """As the private operators take it, by their arguments' names."""
    row = ROWS[name]
    known = row.function.removeprefix("dynamic_") + "_full_range" * row.full_range
    return {
        f"{whose}ranges": list(range_.parameters),
        f"{whose}parameterization": list(reference.PARAMETERIZATIONS).index(known),
        f"{whose}bits": range_.bits,
        f"{whose}eps": range_.eps,
        f"{whose}link": list(reference.LINKS).index(range_.link),
        f"{whose}gradient_scale": range_.gradient_scale,
        f"{whose}token": range_.token,
        f"{whose}group": range_.group,
    }


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, expected = actual.double(), expected.double()
    bound = tolerance * expected.abs().max().clamp_min(1e-30)
    assert ((actual - expected).abs() <= bound).all(), (actual - expected).abs().max() / bound


def assert_same_codes(actual: Tensor, expected: Tensor, raw: Tensor) -> None:
    """Equal to rounding, but for a code in a thousand that is one off near a tie. raw: what was
    quantized, with 8 bits, whose largest element is no smaller than half the range."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.numel() == 0:
        return
    difference = (actual - expected).detach().double().abs()
    largest = raw.detach().double().abs().max()
    ulp = torch.finfo(actual.dtype).eps * largest
    off = (difference > 4 * ulp).sum().item()
    assert off <= max(1, actual.numel() // 1000), f"{off} of {actual.numel()} differ"
    assert difference.max() <= 4 * largest / 255 + 4 * ulp


def assert_range_gradient(actual: Tensor, expected: Tensor, terms: Tensor) -> None:
    """Range gradients are sums whose terms cancel: their errors go with the sum of |terms|."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs() <= 1e-5 * expected.abs() + 1e-6 * terms


def opcheck_private(call, names: list[str]) -> None:
    """opcheck of the operators below autograd that call() and its backward reach."""
    with OperatorCalls() as recorder:
        call().sum().backward()
    assert [function.__name__ for function, _ in recorder.calls] == names
    for function, arguments in recorder.calls:
        torch.library.opcheck(function, tuple(_detached(a) for a in arguments))


def _detached(argument):
    if torch.is_tensor(argument):
        return argument.detach()
    if isinstance(argument, (list, tuple)):
        return [_detached(a) for a in argument]
    return argument


def assert_wanted_gradients_alone(call, groups: list[list[Tensor]], wanted: tuple) -> None:
    """Each group of leaves may be frozen; the others' gradients stay the same to the bit."""
    everything = [tensor for group in groups for tensor in group]
    expected = torch.autograd.grad(call().square().sum(), everything)
    for group, wants in zip(groups, wanted, strict=True):
        for tensor in group:
            tensor.requires_grad_(wants)
    out = call()
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.square().sum().backward()
    for tensor, gradient in zip(everything, expected, strict=True):
        assert (tensor.grad is None) != tensor.requires_grad
        assert tensor.grad is None or torch.equal(tensor.grad, gradient)


def assert_takes_expanded_gradient(call, x: Tensor) -> None:
    """sum() delivers one number for all elements."""
    (actual,) = torch.autograd.grad(call().sum(), x)
    (expected,) = torch.autograd.grad(call(), x, torch.ones_like(x))
    assert torch.equal(actual, expected)


def assert_repeatable(call, leaves: list[Tensor]) -> None:
    """The same bits at every call, whatever the number of threads."""

    def step():
        out = call()
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    first, threads = step(), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, e) for a, e in zip(step(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def assert_compiles(call, leaves: list[Tensor], backend: str, dynamic: bool) -> None:
    """call(leaves[0]) compiled gives the bits of the call itself, gradients included."""
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    outs = [function(leaves[0]) for function in (compiled, call)]
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in outs]
    for actual, expected in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert torch.equal(actual, expected)


def assert_transforms_say_so(call, x: Tensor, name: str) -> None:
    """torch.func cannot differentiate call(x): one sentence of ours names the operator and the way
    out."""
    message = rf"asymq::{name}: torch.func cannot differentiate .*use_functions\(\"reference\"\)"
    x = x.detach()
    for transformed in (
        torch.func.grad(lambda x: call(x).sum()),
        torch.func.jacrev(call),
        lambda x: torch.func.jvp(call, (x,), (x,)),
        lambda x: torch.func.vmap(torch.func.grad(lambda x: call(x).sum()))(x[None]),
    ):
        with pytest.raises(RuntimeError, match=message):
            transformed(x)


def assert_no_second_derivative(out: Tensor, leaf: Tensor, name: str) -> None:
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=name):
        first.sum().backward()
