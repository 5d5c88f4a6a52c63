"""The backend of ModelOpt against its own kernels, in a process that has both."""

import copy
import warnings

import pytest
import torch
from operator_calls import OperatorCalls
from torch import nn

pytest.importorskip("modelopt")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

from asymq.integrations.modelopt import learn_amax

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # ModelOpt's own
]

FORMATS = {
    "tensor": {"num_bits": 8, "axis": None},
    "row": {"num_bits": 8, "axis": 0},
    "column": {"num_bits": 4, "axis": 1},
    "two axes": {"num_bits": 4, "axis": (0, 1)},
    "blocks": {"num_bits": 4, "block_sizes": {-1: 4}},
    "padded blocks": {"num_bits": 4, "block_sizes": {-1: 5}},
    "blocks of rows": {"num_bits": 4, "block_sizes": {-1: 4, -2: 2}},
    "narrow": {"num_bits": 8, "axis": 0, "narrow_range": True},
    "12 bits": {"num_bits": 12, "axis": 0},
    "token": {"num_bits": 8, "block_sizes": {-1: None}, "type": "dynamic"},
    "unsigned": {"num_bits": 8, "axis": None, "unsigned": True},
    "bias": {"num_bits": 8, "axis": 0, "bias": {-1: None, "type": "static", "method": "max_min"}},
}


def quantizer(backend, data, **attributes):
    """Calibrated on data, where it is static."""
    made = TensorQuantizer(QuantizerAttributeConfig(backend=backend, **attributes))
    if attributes.get("type") != "dynamic":
        made.disable_quant()
        made.enable_calib()
        if "bias" in attributes:
            made.bias_calibrator.collect(data)
            made.bias_value = made.bias_calibrator.compute_bias()
        made(data)
        made.load_calib_amax()
        made.disable_calib()
        made.enable_quant()
    return made


def run(made, x, g):
    x = x.clone().requires_grad_()
    with OperatorCalls() as seen:
        y = made(x)
        y.backward(g)
    return y.detach(), x.grad, seen.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pass_through", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, pass_through, dtype):
    """ModelOpt multiplies by 1/s: next to a tie the code may be another. It masks by amax, asymq by
    what is rounded into the grid: half a step more."""
    attributes = FORMATS[format] | {"pass_through_bwd": pass_through}
    data = torch.randn(6, 8, 12).to(dtype)
    if format == "unsigned":
        data = data.abs()
    own, theirs = (quantizer(backend, data, **attributes) for backend in ("asymq", None))
    x, g = 1.5 * data, torch.randn_like(data)
    y, gradient, calls = run(own, x, g)
    expected, wanted, none = run(theirs, x, g)
    assert calls and not none
    assert y.dtype == gradient.dtype == dtype
    rounding = torch.finfo(dtype).eps
    same = (y - expected).abs() <= 2 * rounding * expected.abs() + 1e-6
    assert same.float().mean() > 0.99
    assert (y - expected).abs().max() <= 1.01 * x.abs().max() / (
        2 ** attributes["num_bits"] / 2 - 1
    )
    if pass_through:
        assert torch.equal(gradient, g)
    else:
        assert torch.isin(gradient, torch.cat([g.flatten(), torch.zeros(1, dtype=dtype)])).all()
        assert (gradient == wanted).float().mean() > 0.85


def test_amax_of_zero_gives_zero():
    made = quantizer("asymq", torch.zeros(4), num_bits=8)
    assert made(torch.tensor([-1.0, 0.0, 1.0])).abs().max() < 1e-30


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_bits": (4, 3)}, r"integer format of 2 to 16 bits, num_bits is \(4, 3\)"),
        ({"num_bits": 1}, "integer format of 2 to 16 bits, num_bits is 1"),
        ({"num_bits": "mine"}, "integer format"),
        (
            {"num_bits": 8, "block_sizes": {-1: 4, "type": "dynamic", "scale_bits": (8, 0)}},
            "blocks",
        ),
    ],
)
def test_the_rest_is_refused(attributes, message):
    made = TensorQuantizer(QuantizerAttributeConfig(backend="asymq", **attributes))
    with pytest.raises(ValueError, match=message):
        made(torch.randn(4, 8))


def network():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def configuration(backend, **attributes):
    attributes |= {"backend": backend}
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": FORMATS["blocks"] | attributes},
        {"quantizer_name": "*input_quantizer", "cfg": FORMATS["tensor"] | attributes},
    ]
    return {"quant_cfg": entries, "algorithm": "max"}


def quantized(model, x, backend, **attributes):
    return mtq.quantize(
        copy.deepcopy(model), configuration(backend, **attributes), lambda model: model(x)
    )


def test_a_quantized_model():
    model, x, g = network(), torch.randn(64, 16), torch.randn(64, 8)
    outputs, gradients = [], []
    for backend in ("asymq", None):
        made = quantized(model, x, backend)
        y = made(x)
        (y * g).sum().backward()
        outputs.append(y.detach())
        gradients.append([p.grad for p in made.parameters()])
    assert (outputs[0] - outputs[1]).abs().median() < 1e-6
    for actual, expected in zip(*gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.99


def test_amax_learns():
    model, x = network(), torch.randn(256, 16)
    y = model(x).detach()
    made = quantized(model, x, "asymq")
    names = set(made.state_dict())
    learned = learn_amax(made)
    assert learn_amax(made) == learned and len(learned) == 4
    assert set(made.state_dict()) == names
    with torch.no_grad():
        for amax in learned:
            amax.mul_(2)  # too wide: learning pulls it in
        before = nn.functional.mse_loss(made(x), y).item()
    optimizer = torch.optim.Adam(learned, lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.mse_loss(made(x), y).backward()
        assert all(p.grad.abs().max() > 0 for p in learned)
        optimizer.step()
    assert nn.functional.mse_loss(made(x), y).item() < 0.7 * before
    again = quantized(model, x, "asymq")
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))


def test_lsq_is_modelopts():
    made = quantized(network(), torch.randn(4, 16), "asymq")
    made[0].weight_quantizer.enable_lsq(quantize_scales=False)
    assert len(learn_amax(made)) == 3
    assert "_amax" not in dict(made[0].weight_quantizer.named_parameters())


def test_what_cannot_learn_is_refused():
    with pytest.raises(ValueError, match="no quantizer with the backend"):
        learn_amax(quantized(network(), torch.randn(4, 16), None))
    made = quantized(network(), torch.randn(4, 16), "asymq")
    made[2].input_quantizer.reset_amax()
    with pytest.raises(ValueError, match=r"2\.input_quantizer has no amax"):
        learn_amax(made)
    assert not [n for n, _ in made.named_parameters() if "amax" in n]
