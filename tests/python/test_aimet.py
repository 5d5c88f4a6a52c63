"""The backend of aimet-torch against AIMET's own torch backend, in a process that has both."""

import copy
import warnings

import pytest
import torch
from operator_calls import OperatorCalls
from torch import nn

pytest.importorskip("aimet_torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from aimet_torch import QuantizationSimModel
    from aimet_torch.experimental import pgs
    from aimet_torch.quantization import get_backend, set_backend
    from aimet_torch.quantization.affine import (
        GroupedBlockQuantizeDequantize,
        dequantize,
        quantize,
        quantize_dequantize,
    )

import asymq

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # AIMET's own
]

GRANULARITIES = {
    "tensor": ((), None),
    "one": ((1,), None),
    "row": ((8, 1), None),
    "channel": ((2, 1, 1), None),
    "column": ((12,), None),
    "groups": ((8, 3), (1, 4)),
    "rest": ((8, 3), (-1, -1)),
    "blocks": ((2, 3), (4, 4)),
    "blocks of 3": ((1, 8, 3), (2, 1, 4)),
}
GRIDS = {"unsigned": (0, 255), "signed": (-128, 127), "4 bits": (0, 15), "12 bits": (-2048, 2047)}


def arguments(granularity, grid, dtype=torch.float32):
    """x, scale and offset that learn, the grid and the blocks; some of x is outside."""
    shape, block_size = GRANULARITIES[granularity]
    qmin, qmax = GRIDS[grid]
    x = torch.randn(2, 8, 12, dtype=dtype)
    ends = torch.float64 if dtype == torch.float64 else torch.float32
    scale = 3 * (1 + torch.rand(shape, dtype=ends)) / (qmax - qmin)
    offset = torch.randint(-(qmax + qmin + 1) // 2 - 2, 3 - (qmax + qmin + 1) // 2, shape).to(ends)
    return [t.requires_grad_() for t in (x, scale, offset)], (qmin, qmax), block_size


def results(backend, function, tensors, g, *arguments):
    """y, and gradients where there are some."""
    tensors = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    with set_backend(backend), OperatorCalls() as seen:
        y = function(*tensors, *arguments)
        if y.requires_grad:
            y.backward(g)
    return y.detach(), [t.grad for t in tensors], seen.calls


def assert_same(function, tensors, *arguments, own, exact=True):
    g = torch.randn_like(tensors[0])
    y, gradients, calls = results("asymq", function, tensors, g, *arguments)
    expected, wanted, none = results("torch_builtins", function, tensors, g, *arguments)
    assert bool(calls) == own and not none
    if exact:
        assert torch.equal(y, expected)
    assert y.dtype == expected.dtype
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert (actual is None) == (gradient is None)
        if actual is not None:
            torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-5)


def test_it_registers_by_itself():
    with set_backend("asymq"):
        assert get_backend() is asymq.integrations.aimet


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantize_dequantize(granularity, grid):
    tensors, ends, block_size = arguments(granularity, grid)
    assert_same(quantize_dequantize, tensors, *ends, block_size, own=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types(dtype):
    """Of 12 bits, which AIMET computes in float32 too."""
    tensors, ends, block_size = arguments("groups", "12 bits", dtype)
    assert_same(quantize_dequantize, tensors, *ends, block_size, own=True)


def test_half_ranges():
    """Of a model that was cast: their gradients are of their dtype."""
    (x, *ranges), ends, _ = arguments("row", "12 bits", torch.bfloat16)
    scale, offset = (t.detach().bfloat16().requires_grad_() for t in ranges)
    with set_backend("asymq"):
        quantize_dequantize(x, scale, offset, *ends).sum().backward()
    assert scale.grad.dtype == offset.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen(frozen):
    tensors, ends, block_size = arguments("row", "unsigned")
    tensors[frozen].requires_grad_(False)
    assert_same(quantize_dequantize, tensors, *ends, block_size, own=True)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes(granularity, grid):
    tensors, ends, block_size = arguments(granularity, grid)
    for tensor in tensors:
        tensor.requires_grad_(False)
    assert_same(quantize, tensors, *ends, block_size, own=True)


def test_codes_of_a_half_type():
    """Exact where its own codes are, though those of the unsigned grid are not."""
    tensors = torch.randn(64).bfloat16() * 300, torch.tensor(1.0), torch.tensor(0.0)
    assert_same(quantize, tensors, -256, 255, own=True)


def test_compiled():
    (x, scale, offset), ends, block_size = arguments("groups", "unsigned")

    def function(x):
        return quantize_dequantize(x, scale, offset, *ends, block_size)

    with set_backend("asymq"):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        ({"function": quantize}, True),
        ({"function": lambda x, s, o, low, high, blocks: dequantize(x, s, o, blocks)}, True),
        ({"ends": (-127, 127)}, True),
        ({"ends": (0, 1)}, True),
        ({"more": (0.5,)}, True),
    ],
    ids=["codes' gradients", "dequantize", "254 steps", "1 bit", "shift"],
)
def test_the_rest_is_aimets(change, exact):
    tensors, ends, block_size = arguments("groups", "unsigned")
    function, ends = change.get("function", quantize_dequantize), change.get("ends", ends)
    more = change.get("more", ())
    assert_same(function, tensors, *ends, block_size, *more, own=False, exact=exact)


def test_spiked_gradients_are_aimets():
    tensors, ends, _ = arguments("tensor", "unsigned")
    pgs.enable_pgs()
    try:
        assert_same(quantize_dequantize, tensors, *ends, own=False)
    finally:
        pgs.disable_pgs()


@pytest.mark.parametrize(
    ("shape", "block_size"), [((4, 1), None), ((8, 3), (1, 5)), ((8, 5), (1, -1)), ((8, 3), (4,))]
)
def test_what_does_not_fit_is_refused_by_aimet(shape, block_size):
    """Not taken for groups: without a block size a range expands or is wrong."""
    x, scale = torch.randn(2, 8, 12), torch.ones(shape)
    for function in (quantize, quantize_dequantize):
        with set_backend("asymq"), pytest.raises(RuntimeError, match=r"[Ss]cale"):
            function(x, scale, torch.zeros(shape), 0, 255, block_size)


def test_codes_that_a_type_does_not_hold_are_refused():
    x = torch.randn(8).bfloat16()
    with set_backend("asymq"), pytest.raises(RuntimeError, match="unable to represent"):
        quantize(x, torch.tensor(1e-3), torch.tensor(0.0), -2048, 2047)


def test_grouped_blocks():
    """LPBQ's scales have a grid of their own, of 1 to 16, on which the gradients pass."""
    x, g = torch.randn(8, 64), torch.randn(8, 64)
    grouping = {"block_size": (1, 16), "block_grouping": (1, 4)}
    made = GroupedBlockQuantizeDequantize((8, 4), 4, True, decompressed_bw=8, **grouping)
    with made.compute_encodings():
        made(x)
    outputs, gradients = [], []
    for backend in ("asymq", "torch_builtins"):
        with set_backend(backend), OperatorCalls() as seen:
            y = made(x)
            made.zero_grad()
            y.backward(g)
        assert bool(seen.calls) == (backend == "asymq")
        outputs.append(y)
        gradients.append([p.grad for p in made.parameters()])
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(36)
        self.up = nn.Linear(36, 32)
        self.head = nn.Linear(8 * 32, 10)

    def forward(self, x):
        x = self.norm(torch.relu(self.conv(x)).flatten(2))
        return self.head(torch.tanh(self.up(x)).flatten(1))


@pytest.fixture(scope="module")
def sim():
    x = torch.randn(4, 3, 8, 8)
    made = QuantizationSimModel(Network().eval(), x, default_param_bw=4, default_output_bw=8)
    made.compute_encodings(lambda model: model(x))
    with torch.no_grad():  # narrower, so that something saturates
        for name, parameter in made.model.named_parameters():
            if "quantizers" in name:
                parameter.mul_(0.8)
    return made


def test_a_model_of_quantsim(sim):
    """All quantizers, with gradients through min and max; the second step starts from others."""
    x, g = torch.randn(16, 3, 8, 8), torch.randn(16, 10)
    models = {name: copy.deepcopy(sim.model) for name in ("asymq", "torch_builtins")}
    for _ in range(2):
        outputs, inputs = {}, {}
        for name, model in models.items():
            inputs[name] = x.clone().requires_grad_()
            with set_backend(name), OperatorCalls() as seen:
                outputs[name] = model(inputs[name])
                model.zero_grad()
                (outputs[name] * g).sum().backward()
            assert bool(seen.calls) == (name == "asymq")
        assert torch.equal(*outputs.values())
        assert torch.equal(*(t.grad for t in inputs.values()))
        parameters = (m.named_parameters() for m in models.values())
        for (name, actual), (_, expected) in zip(*parameters, strict=True):
            assert (actual.grad is None) == (expected.grad is None), name
            if actual.grad is not None:
                largest = expected.grad.abs().max().item()
                torch.testing.assert_close(
                    actual.grad, expected.grad, rtol=1e-4, atol=1e-5 * largest, msg=name
                )
                with torch.no_grad():  # both take the same step
                    actual.sub_(1e-3 * expected.grad)
                    expected.sub_(1e-3 * expected.grad)


def test_a_model_in_inference(sim):
    """AIMET then multiplies by 1/s: a code may be another where x/s is all but a tie."""
    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        outputs = []
        for name in ("asymq", "torch_builtins"):
            with set_backend(name):
                outputs.append(sim.model(x))
    step = sim.model.head.output_quantizers[0].get_scale()
    moved = (outputs[0] - outputs[1]).abs() / step
    assert moved.max() < 3 and (moved < 0.5).float().mean() > 0.9
