"""The operators under opcheck, torch.compile, export, checkpointing, autocast and torch.func."""

import copy
import io

import pytest
import torch
from compare import assert_bit_equal
from fused import assert_transforms_say_so
from operator_calls import OperatorCalls
from samples import DYNAMIC, PARAMETERIZATIONS, SAMPLES, DynamicSample, Sample
from torch.utils.checkpoint import checkpoint

import asymq

pytestmark = pytest.mark.composite

OPS = torch.ops.asymq


def public(sample):
    return getattr(OPS, f"fake_quantize_{sample.spec.function}").default


def step(call, sample, inputs):
    """x̂ and all gradients."""
    x, parameters, grad = inputs
    xhat = call(x, *parameters)
    leaves = (x, *parameters[: len(sample.spec.learned)])
    return xhat, *torch.autograd.grad(xhat, leaves, grad)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample, device):
    """The public operator, and what it calls, with the arguments it calls it with."""
    inputs = sample.build(device)
    arguments = sample.dispatcher_arguments(inputs.x, *inputs.parameters)
    torch.library.opcheck(public(sample), arguments)
    with OperatorCalls() as recorder:
        step(
            lambda *tensors: public(sample)(*sample.dispatcher_arguments(*tensors)), sample, inputs
        )
    names = [function.__name__ for function, _ in recorder.calls]
    assert names == [f"{sample.operator}.default", f"{sample.operator}_backward.default"]
    (forward, arguments), (backward, backward_arguments) = recorder.calls
    torch.library.opcheck(forward, arguments)
    # It has no derivative of its own, so nothing may ask for one.
    detached = [t.detach() if torch.is_tensor(t) else t for t in backward_arguments]
    torch.library.opcheck(backward, tuple(detached))


@pytest.mark.parametrize("offset", [False, True])
def test_opcheck_of_codes(offset, device):
    x = torch.randn(4, 6, device=device)
    scale = torch.full((4, 1), 0.1, device=device)
    offset = torch.full((4, 1), -3.0, device=device) if offset else None
    torch.library.opcheck(OPS.quantize.default, (x, scale, offset, 4, 1e-8))
    codes = asymq.quantize(x, scale, offset, bits=4)
    torch.library.opcheck(OPS.dequantize.default, (codes, scale, offset, 4, 1e-8))
    torch.library.opcheck(OPS.update_codes_.default, (codes, x / 2, scale, offset, 4, 1e-8))


def compiled_step(sample, device, backend, dynamic):

    def call(*tensors):
        return sample.call(asymq, *tensors).clone()

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    inputs = sample.build(device)
    for a, e in zip(step(compiled, sample, inputs), step(call, sample, inputs), strict=True):
        assert_bit_equal(a, e)
    return compiled


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "sample",
    [
        *(Sample(n, granularity="axis0") for n in PARAMETERIZATIONS),
        *(DynamicSample(n, granularity="positions") for n in DYNAMIC),
    ],
    ids=str,
)
def test_compile(sample, dynamic, device):
    compiled_step(sample, device, "aot_eager", dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "sample",
    [
        Sample("beta_gamma", "bfloat16", "last", layout="transposed"),
        Sample("min_max", layout="expanded_gradient", strided_ranges=True),
        Sample("symmetric_scale", granularity="groups", layout="sliced"),
        DynamicSample("dynamic_beta_gamma", "bfloat16", layout="transposed"),
        DynamicSample("dynamic_symmetric_gamma", granularity="groups", layout="sliced"),
    ],
    ids=str,
)
def test_compile_with_inductor(sample, dynamic, device):
    compiled_step(sample, device, "inductor", dynamic)


def test_one_graph_serves_all_sizes(device):
    """Per tensor, per row and in groups: no size is baked into a dynamic graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(
        lambda x, s: asymq.fake_quantize_symmetric_scale(x, s, bits=8),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for rows, columns in ((4, 6), (5, 9), (8, 30)):
        x = torch.randn(rows, columns, device=device)
        for shape in ((rows, 1), (rows, columns // 3)):
            scale = torch.full(shape, 0.1, device=device)
            expected = asymq.fake_quantize_symmetric_scale(x, scale, bits=8)
            assert_bit_equal(call(x, scale), expected)
    assert len(graphs) <= 4


def test_one_graph_serves_tokens_of_all_sizes(device):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(
        lambda x, gamma: asymq.fake_quantize_dynamic_symmetric_gamma(x, gamma, bits=8),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    gamma = torch.ones(1, device=device)
    for shape in ((4, 6), (5, 9), (8, 30)):
        x = torch.randn(shape, device=device)
        expected = asymq.fake_quantize_dynamic_symmetric_gamma(x, gamma, bits=8)
        assert_bit_equal(call(x, gamma), expected)
    assert len(graphs) == 1


def test_compiled_codes(device):
    x, scale = torch.randn(4, 6, device=device), torch.full((4, 1), 0.1, device=device)

    def round_trip(x, low, high):
        scale, offset = asymq.effective_scale_offset("min_max", low, high, bits=4)
        codes = asymq.quantize(x, scale, offset, bits=4)
        return asymq.dequantize(codes, scale, offset, bits=4)

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert_bit_equal(compiled(x, -scale, 9 * scale), round_trip(x, -scale, 9 * scale))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_update_of_codes(backend, device):
    x, scale = torch.randn(4, 6, device=device), torch.full((4, 1), 0.1, device=device)

    def updated(codes, x):
        changed = asymq.update_codes_(codes, x, scale, bits=4)
        return changed / codes.numel(), asymq.update_codes_(codes, x / 2, scale, bits=4)

    compiled = torch.compile(updated, fullgraph=True, backend=backend)
    codes = [torch.zeros(4, 6, dtype=torch.int8, device=device) for _ in range(2)]
    for a, e in zip(compiled(codes[0], x), updated(codes[1], x), strict=True):
        assert torch.equal(a, e) and a > 0
    assert torch.equal(*codes)


class Quantizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.low = torch.nn.Parameter(torch.tensor([-1.0]))
        self.high = torch.nn.Parameter(torch.tensor([1.0]))

    def forward(self, x):
        return asymq.fake_quantize_min_max(x, self.low, self.high, bits=4)


def test_export_save_and_load(device):
    module, x = Quantizer().to(device), torch.randn(4, 6, device=device)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(target.startswith("asymq.") for target in targets)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    longer = torch.randn(9, 6, device=device)
    for values in (x, longer):
        assert_bit_equal(loaded(values), module(values))


def test_deepcopy(device):
    module = Quantizer().to(device)
    twin = copy.deepcopy(module)
    x = torch.randn(8, device=device)
    module(x).sum().backward()
    assert twin.low.grad is None
    twin(x).sum().backward()
    assert_bit_equal(twin.low.grad, module.low.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, device):
    sample = Sample("beta_gamma", granularity="last")
    inputs = sample.build(device)

    def call(*tensors):
        return sample.call(asymq, *tensors)

    def checkpointed(*tensors):
        return checkpoint(call, *tensors, use_reentrant=use_reentrant)

    def backward(function):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs[1]]
        x = inputs.x.detach().clone().requires_grad_()
        function(x, *leaves).backward(inputs.grad)
        return [t.grad for t in (x, *leaves[:2])]

    for a, e in zip(backward(checkpointed), backward(call), strict=True):
        assert_bit_equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_keeps_the_dtype_of_x(dtype, device):
    x = torch.randn(4, 6, dtype=dtype, device=device, requires_grad=True)
    ends = [torch.tensor(v, device=device, requires_grad=True) for v in (-1.0, 1.0)]
    expected = asymq.fake_quantize_min_max(x, *ends, bits=8)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = asymq.fake_quantize_min_max(x, *ends, bits=8)
        grads = torch.autograd.grad(actual.sum(), (x, *ends))
    assert_bit_equal(actual, expected)
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("sample", [Sample(), DynamicSample()], ids=str)
def test_second_derivatives_raise(sample, device):
    """Never a silent zero."""
    x, learned, _ = sample.build(device)
    for leaf in (x, *learned):
        xhat = sample.call(asymq, x, *learned)
        (grad,) = torch.autograd.grad(xhat.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{sample.operator}_backward"):
            torch.autograd.grad(grad.sum(), leaf)


def test_unsupported_transforms_say_so(device):
    x = torch.randn(4, 6, device=device)
    low, high = torch.tensor([-1.0], device=device), torch.tensor([1.0], device=device)

    def call(x):
        return asymq.fake_quantize_min_max(x, low, high, bits=4)

    assert_transforms_say_so(call, x, "fake_quantize_min_max")

    def of_tokens(x):
        return asymq.fake_quantize_dynamic_beta_gamma(x, high, high, bits=4)

    assert_transforms_say_so(of_tokens, x, "fake_quantize_dynamic_beta_gamma")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="jvp"):
            call(dual)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(device):
    """A batch of tensors, each with its own range."""
    x = torch.randn(5, 4, 6, device=device)
    low = -torch.rand(5, 1, device=device)
    actual = torch.func.vmap(lambda x, a: asymq.fake_quantize_min_max(x, a, 1 - a, bits=4))(x, low)
    expected = [
        asymq.fake_quantize_min_max(v, a, 1 - a, bits=4) for v, a in zip(x, low, strict=True)
    ]
    assert_bit_equal(actual, torch.stack(expected))


def test_retained_graph(device):
    """Two backwards through one graph, and an in-place change of x in between is noticed."""
    x, ends, grad = Sample().build(device)
    xhat = asymq.fake_quantize_min_max(x, *ends, bits=8)
    first = torch.autograd.grad(xhat, (x, *ends), grad, retain_graph=True)
    second = torch.autograd.grad(xhat, (x, *ends), grad, retain_graph=True)
    for a, e in zip(first, second, strict=True):
        assert_bit_equal(a, e)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(xhat, ends[0], grad)


@pytest.mark.parametrize(
    "sample",
    [
        Sample("beta_gamma", "bfloat16", "last"),
        DynamicSample("dynamic_beta_gamma", "bfloat16", "positions"),
    ],
    ids=str,
)
def test_saves_x_and_the_ranges_only(sample, device):
    x, parameters, _ = sample.build(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sample.call(asymq, x, *parameters)
    addresses = {t.data_ptr() for t in (x, *parameters)}
    assert {t.data_ptr() for t in saved} <= addresses


def test_meta_tensors():
    """Shapes, strides and dtypes without data."""
    for sample in SAMPLES:
        actual = step(lambda *t, s=sample: s.call(asymq, *t), sample, sample.build("meta"))
        expected = step(lambda *t, s=sample: s.call(asymq, *t), sample, sample.build())
        for a, e in zip(actual, expected, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (e.shape, e.stride(), e.dtype)
