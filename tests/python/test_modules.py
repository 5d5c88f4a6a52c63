"""Quantizers and layers: ranges, states, gradients, casts, and the way from and to float."""

import copy
import itertools
import math

import pytest
import torch
from compare import assert_bit_equal, assert_sums
from recorder import Recorder
from torch import nn

import asymq
from asymq import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantAct,
    QuantEmbedding,
    QuantLayerNorm,
    QuantLinear,
    QuantSpec,
    reference,
)
from asymq.layers import fused
from asymq.quantizers import LINKS, PARAMETERIZATIONS
from asymq.quantizers.functions import use_namespace

Conv1D = pytest.importorskip("transformers", minversion="5.4").pytorch_utils.Conv1D


def _specs():
    options = ("symmetric", "sigmoid", "dynamic", "fix_min")
    for name, *values in itertools.product(PARAMETERIZATIONS, *[[False, True]] * len(options)):
        chosen = dict(zip(options, values, strict=True))
        try:
            spec = QuantSpec(bits=4, parameterization=name, **chosen)
        except ValueError:
            continue
        yield pytest.param(spec, id="-".join([name, *(k for k, v in chosen.items() if v)]))
    for link in LINKS[2:]:
        for options in ({}, {"symmetric": True}, {"dynamic": True}, {"fix_min": True}):
            yield pytest.param(QuantSpec(4, link=link, **options), id="-".join([link, *options]))


SPECS = list(_specs())
# The value under a link that is a quarter.
QUARTERS = {
    "sigmoid": -math.log(3),
    "exp": -math.log(4),
    "softplus": math.log(math.expm1(0.25)),
    "clamp": 0.25,
}

# name: (float layer, how to quantize it, an input)
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), QuantLinear.from_float, lambda: torch.randn(5, 7, 12)),
    "conv1d": (lambda: Conv1D(8, 12), QuantLinear.from_float, lambda: torch.randn(5, 7, 12)),
    "embedding": (
        lambda: nn.Embedding(20, 12),
        QuantEmbedding.from_float,
        lambda: torch.randint(0, 20, (5, 7)),
    ),
    "layer_norm": (
        lambda: nn.LayerNorm(12),
        QuantLayerNorm.from_float,
        lambda: torch.randn(5, 7, 12),
    ),
}


def perturbed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def build(name, spec):
    """A layer whose weight and output have this spec, or an activation's quantizer; and an input"""
    if name == "act":
        return QuantAct(spec, 12), torch.randn(5, 7, 12)
    make, from_float, x = LAYERS[name]
    options = {} if name == "embedding" else {"output": spec}
    return from_float(perturbed(make()), weight=spec, **options), x()


def ranges_of(module):
    return [p for _, q in asymq.named_quantizers(module) for p in q.parameters()]


def gradients(module, x, upstream=None):
    """Output, gradient of x, and gradients by name."""
    module.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = module(x)
    y.backward(torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y))
    return y, x.grad, {name: p.grad for name, p in module.named_parameters()}


# ---- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "name, train_weights",
    [("act", False), *itertools.product(LAYERS, [False, True])],
    ids=lambda value: {False: "frozen", True: "joint"}.get(value, value),
)
def test_equals_reference(name, train_weights, spec, device):
    module, x = build(name, spec)
    module, x = module.to(device), x.to(device)
    asymq.calibrate(module, [x])
    if not train_weights:
        asymq.freeze_weights(module)
    with torch.no_grad():
        for parameter in ranges_of(module):  # so that values lie outside, too
            parameter.mul_(0.6)

    y, dx, actual = gradients(module, x)
    with use_namespace(Recorder()) as recorder:
        expected_y, expected_dx, expected = gradients(module, x)
        ranges = {id(p) for p in ranges_of(module)}
        terms = {n: recorder.terms(p) for n, p in module.named_parameters() if id(p) in ranges}

    assert_bit_equal(y, expected_y)
    if x.is_floating_point():
        assert_bit_equal(dx, expected_dx)
    for parameter, value in expected.items():
        if parameter in terms:
            assert_sums(actual[parameter], value, terms[parameter])
            # A range whose constant end is 0 has nothing to learn there.
            assert value.any() or not terms[parameter].any()
        elif train_weights:
            assert_bit_equal(actual[parameter], value)
        else:
            assert actual[parameter] is None and value is None
    assert len(recorder.calls) == len(list(asymq.named_quantizers(module)))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["act", *LAYERS])
def test_learning_reduces_the_error(name, spec, device):
    module, x = build(name, spec)
    module, x = module.to(device), x.to(device)
    asymq.disable_quantizers(module)
    target = module(x).detach()
    asymq.calibrate(module, [x])
    asymq.freeze_weights(module)
    with torch.no_grad():
        for parameter in ranges_of(module):
            quarter = QUARTERS.get(spec.link)  # of the range
            parameter.copy_(parameter / 4 if quarter is None else parameter.new_tensor(quarter))
    size = {p: p.detach().abs().mean().item() or 1.0 for p in ranges_of(module)}
    optimizer = torch.optim.Adam([{"params": [p], "lr": 0.05 * size[p]} for p in size])
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---- ranges ------------------------------------------------------------------------------------

# layer, granularity of the weight, shape of its ranges
WEIGHT_SHAPES = [
    ("linear", PerTensor(), (1,)),
    ("linear", PerChannel(), (8, 1)),
    ("linear", PerChannel(0), (8, 1)),
    ("linear", PerChannel(-1), (1, 12)),
    ("linear", PerGroup(4), (8, 3)),
    ("linear", PerGroup(4, axis=0), (2, 12)),
    ("conv1d", PerTensor(), (1,)),
    ("conv1d", PerChannel(), (1, 8)),
    ("conv1d", PerChannel(0), (12, 1)),
    ("conv1d", PerGroup(4), (3, 8)),
    ("conv1d", PerGroup(4, axis=1), (12, 2)),
    ("embedding", PerTensor(), (1,)),
    ("embedding", PerChannel(), (20, 1)),
    ("embedding", PerGroup(4), (20, 3)),
    ("layer_norm", PerTensor(), (1,)),
    ("layer_norm", PerChannel(), (12,)),
    ("layer_norm", PerGroup(4), (3,)),
]


@pytest.mark.parametrize("name, granularity, shape", WEIGHT_SHAPES, ids=str)
def test_granularity_of_weights(name, granularity, shape):
    spec = QuantSpec(bits=4, symmetric=True, granularity=granularity, parameterization="min_max")
    make, from_float, x = LAYERS[name]
    module = from_float(perturbed(make()), weight=spec)
    assert module.weight_quantizer.max.shape == shape
    asymq.calibrate(module, [x()])

    weight = module.weight.detach()
    parts = weight.abs()
    if shape != (1,):
        for axis, blocks in enumerate(shape):
            parts = torch.stack([part.amax(axis) for part in parts.chunk(blocks, axis)], axis)
    assert_bit_equal(
        module.weight_quantizer.max.detach(), parts.amax().view(1) if shape == (1,) else parts
    )

    # Each part of the weight is quantized as if it were alone.
    quantized = module.quantized_weight()
    for index in itertools.product(*map(range, shape)):
        part, result = weight, quantized
        if shape != (1,):
            for axis, (place, blocks) in enumerate(zip(index, shape, strict=True)):
                part, result = (t.chunk(blocks, axis)[place] for t in (part, result))
        alone = asymq.fake_quantize_symmetric_max(part, part.abs().max().view(1), bits=4)
        assert_bit_equal(result, alone)


@pytest.mark.parametrize(
    "granularity, channels, shape, on_x",
    [
        (PerTensor(), None, (1,), (1,)),
        (PerChannel(), 12, (12,), (1, 1, 12)),
        (PerChannel(1), 6, (6,), (1, 6, 1)),
        (PerChannel(-2), 6, (6,), (1, 6, 1)),
        (PerGroup(4), 12, (3,), (1, 1, 3)),
        (PerGroup(3, axis=1), 6, (2,), (1, 2, 1)),
    ],
    ids=str,
)
def test_granularity_of_activations(granularity, channels, shape, on_x):
    spec = QuantSpec(bits=6, granularity=granularity, parameterization="min_max")
    quantizer = QuantAct(spec, channels)
    assert quantizer.min.shape == quantizer.max.shape == shape
    x = torch.randn(2, 6, 12) * torch.arange(1, 13)
    asymq.calibrate(quantizer, [x])
    low, high = (end.view(on_x) for end in (quantizer.min, quantizer.max))
    assert_bit_equal(quantizer(x), asymq.fake_quantize_min_max(x, low, high, bits=6))
    assert ((quantizer(x) - x).abs() <= 0.51 * (high - low).max() / 63).all()


@pytest.mark.parametrize("axis, channels", [(3, 4), (-4, 4)])
def test_axis_out_of_range(axis, channels):
    quantizer = QuantAct(QuantSpec(granularity=PerChannel(axis)), channels, name="h.0.mlp")
    with pytest.raises(ValueError, match=rf"h\.0\.mlp: axis must be in \[-3, 3\), got {axis}"):
        asymq.calibrate(quantizer, [torch.randn(4, 4, 4)])


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: QuantAct(QuantSpec(granularity=PerChannel())),
            r"QuantAct: PerChannel\(axis=None\) needs an axis of known size \(channels\)",
        ),
        (
            lambda: QuantAct(QuantSpec(granularity=PerGroup(5)), 12, name="h.0"),
            "h.0: groups of 5 do not divide an axis of 12",
        ),
        (
            lambda: QuantLinear(12, 8, weight=QuantSpec(granularity=PerGroup(5))),
            "weight_quantizer: groups of 5 do not divide an axis of 12",
        ),
        (
            lambda: QuantLinear(12, 8, weight=QuantSpec(granularity=PerChannel(2))),
            r"weight_quantizer: axis must be in \[-2, 2\), got 2",
        ),
        (
            lambda: QuantLayerNorm(12, weight=QuantSpec(granularity=PerChannel(1))),
            r"weight_quantizer: axis must be in \[-1, 1\), got 1",
        ),
    ],
)
def test_granularity_that_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


LEARNED = [
    ({"parameterization": "scale_offset"}, ["scale", "offset"], []),
    ({"parameterization": "min_max"}, ["min", "max"], []),
    ({"parameterization": "min_max", "fix_min": True}, ["max"], ["min"]),
    ({"parameterization": "beta_gamma"}, ["beta", "gamma"], ["min", "max"]),
    ({"fix_min": True}, ["gamma"], ["beta", "min", "max"]),
    ({"dynamic": True}, ["beta", "gamma"], []),
    ({"dynamic": True, "fix_min": True}, ["gamma"], ["beta"]),
    ({"parameterization": "kscale_koffset"}, ["kscale", "koffset"], []),
    ({"parameterization": "scale_offset", "symmetric": True}, ["scale"], []),
    ({"parameterization": "min_max", "symmetric": True}, ["max"], []),
    ({"symmetric": True}, ["gamma"], ["max"]),
    ({"symmetric": True, "dynamic": True}, ["gamma"], []),
]


@pytest.mark.parametrize("options, learned, constant", LEARNED, ids=str)
def test_ranges_exist_from_the_start(options, learned, constant):
    quantizer = QuantAct(QuantSpec(**options))
    parameters, buffers = dict(quantizer.named_parameters()), dict(quantizer.named_buffers())
    assert list(parameters) == learned
    assert set(buffers) == {*constant, *(f"initial_{name}" for name in learned)}
    for name, tensor in {**parameters, **buffers}.items():
        assert tensor.shape == (1,) and tensor.dtype == torch.float32, name
        assert tensor.isnan().all() != bool(options.get("dynamic")), name
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters.values())
    assert quantizer.calibrated == bool(options.get("dynamic"))

    # An optimizer made now learns what calibration fills in later.
    asymq.calibrate(quantizer, [torch.randn(30)])
    assert dict(quantizer.named_parameters()) == parameters
    for name, tensor in quantizer.range_tensors().items():
        assert tensor.isfinite().all(), name
    for name in learned:
        assert_bit_equal(getattr(quantizer, f"initial_{name}"), parameters[name].detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cast", ["to", "method"])
@pytest.mark.parametrize("name", ["act", *LAYERS])
def test_ranges_keep_their_dtype(name, cast, dtype, device):
    module, x = build(name, QuantSpec(bits=8))
    module, x = module.to(device), x.to(device)
    asymq.calibrate(module, [x])
    before = {k: v.clone() for k, v in module.state_dict().items() if "quantizer" in k}
    before = before or {k: v.clone() for k, v in module.state_dict().items()}
    method = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    module = module.to(dtype) if cast == "to" else getattr(module, method)()
    for key, value in before.items():
        assert_bit_equal(module.state_dict()[key], value)
    x = x.to(dtype) if x.is_floating_point() else x
    y, _, grads = gradients(module, x)
    assert y.dtype == dtype
    for parameter in ranges_of(module):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    if name != "act":
        assert grads["weight"].dtype == module.weight.dtype == dtype


@pytest.mark.parametrize("spec", SPECS)
def test_float64_ranges(spec, device):
    """Nothing on the way rounds them to float32."""
    quantizer = QuantAct(spec, dtype=torch.float64, device=device)
    x = torch.rand(40, dtype=torch.float64, device=device)
    # No extremum is a float32.
    x[:2] = torch.tensor([-4 - 1e-12, 3 + 1e-12], dtype=torch.float64)
    asymq.calibrate(quantizer, [x])
    for name, tensor in quantizer.range_tensors().items():
        assert tensor.dtype == torch.float64, name
    low, high = quantizer.extrema(x)
    assert (low.item(), high.item()) == (-4 - 1e-12, 3 + 1e-12)
    quantized = quantizer(x)
    expected = getattr(reference, spec.function)(
        x,
        *(tensor.detach() for tensor in quantizer.arguments(x)),
        bits=spec.bits,
        **({"link": spec.link} if spec.link != "identity" else {}),
    )
    torch.testing.assert_close(quantized, expected, rtol=1e-12, atol=1e-12)
    quantized.square().sum().backward()
    assert all(p.grad.dtype == torch.float64 for p in quantizer.parameters())
    if not spec.dynamic and not spec.fix_min:
        quantizer.convert("scale_offset")
        assert all(tensor.dtype == torch.float64 for tensor in quantizer.range_tensors().values())


def test_ranges_are_float32_or_float64():
    with pytest.raises(ValueError, match=r"h\.0: ranges must be float32 or float64, got .*16"):
        QuantAct(QuantSpec(), name="h.0", dtype=torch.bfloat16)


def test_ranges_move_with_the_module():
    module = QuantLinear(12, 8, output=QuantSpec()).to("meta", torch.bfloat16)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        expected = torch.float32 if "quantizer" in name else torch.bfloat16
        assert tensor.is_meta and tensor.dtype == expected, name


# ---- states ------------------------------------------------------------------------------------


def test_states():
    quantizer = QuantAct(QuantSpec(bits=4, parameterization="min_max"), name="act")
    x = torch.randn(40)
    assert quantizer.state == "quantizing" and quantizer.take_observed() is None

    quantizer.start_observing()
    assert quantizer.state == "observing"
    assert quantizer(x[:20]) is not None
    assert_bit_equal(quantizer(x), x)
    quantizer(x[:0])
    low, high = quantizer.take_observed()
    assert (low, high) == (x.min(), x.max())
    assert not quantizer.calibrated

    quantizer.set_range(low, high)
    for state, same in (("off", True), ("observing", True), ("quantizing", False)):
        quantizer.state = state
        assert torch.equal(quantizer(x), x) == same, state
        assert_bit_equal(
            quantizer.fake_quantize(x), asymq.fake_quantize_min_max(x, low, high, bits=4)
        )


def test_enable_and_disable():
    module, x = build("linear", QuantSpec(bits=3))
    asymq.calibrate(module, [x])
    quantized, expected = module(x), module.to_float()(x)
    ranges = [p.clone() for p in ranges_of(module)]
    asymq.disable_quantizers(module)
    assert {q.state for _, q in asymq.named_quantizers(module)} == {"off"}
    assert_bit_equal(module(x), expected)
    asymq.enable_quantizers(module)
    assert_bit_equal(module(x), quantized)
    assert all(map(torch.equal, ranges_of(module), ranges))


@pytest.mark.parametrize("name", ["act", *LAYERS])
def test_uncalibrated_use_names_the_quantizer(name):
    module, x = build(name, QuantSpec())
    label = "QuantAct" if name == "act" else "weight_quantizer"
    with pytest.raises(RuntimeError, match=f"{label}: .*calibrate"):
        module(x)
    asymq.disable_quantizers(module)
    module(x)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "8 bits, PerTensor(), beta_gamma, uncalibrated"),
        (
            {"bits": 4, "symmetric": True, "granularity": PerChannel(0), "sigmoid": True},
            "4 bits, symmetric, PerChannel(axis=0), beta_gamma, sigmoid, uncalibrated",
        ),
        (
            {"granularity": PerGroup(2), "dynamic": True, "fix_min": True},
            "8 bits, PerGroup(size=2, axis=None), beta_gamma, dynamic, fix_min, dynamic range, "
            "gamma 1",
        ),
    ],
)
def test_repr(options, expected):
    quantizer = QuantAct(QuantSpec(**options), 4)
    assert repr(quantizer) == f"QuantAct({expected})"
    asymq.disable_quantizers(quantizer)
    assert repr(quantizer) == f"QuantAct({expected}, off)"


def test_repr_of_ranges():
    low, high = torch.tensor([-1.0]), torch.tensor([2.0])
    one = QuantAct(QuantSpec(bits=2))
    one.set_range(low, high)
    assert repr(one) == "QuantAct(2 bits, PerTensor(), beta_gamma, [-1, 2])"
    two = QuantAct(QuantSpec(bits=2, granularity=PerChannel()), 2)
    two.set_range(torch.tensor([-1.0, -4.0]), torch.tensor([2.0, 2.0]))
    assert repr(two).endswith("beta_gamma, 2 ranges within [-4, 2])")


def test_repr_of_layers():
    layer = QuantLinear(12, 8, bias=False)
    assert "in_features=12, out_features=8, bias=False\n" in repr(layer)
    conv1d = QuantLinear.from_float(Conv1D(8, 12))
    assert "in_features=12, out_features=8, bias=True, Conv1D\n" in repr(conv1d)


# ---- from and to float -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_from_and_to_float(name):
    make, from_float, x = LAYERS[name]
    source, x = perturbed(make()), x()
    source.eval()
    source.note = "kept"
    layer = from_float(source)
    for key, parameter in source.named_parameters():
        assert layer.get_parameter(key) is parameter
    assert not any("quantizer" in key for key in source.state_dict())
    assert not layer.training and layer.note == "kept"

    asymq.calibrate(layer, [x])
    assert not torch.equal(layer(x), source(x))
    plain = layer.to_float()
    assert type(plain) is type(source)
    assert vars(plain).keys() == vars(source).keys()
    assert list(plain.state_dict()) == list(source.state_dict())
    assert plain.weight is layer.weight is source.weight
    assert_bit_equal(plain(x), source(x))
    assert layer.weight_quantizer is not None


def test_float_layers_keep_their_options():
    embedding = QuantEmbedding.from_float(
        nn.Embedding(20, 12, padding_idx=3, scale_grad_by_freq=True)
    )
    plain = copy.deepcopy(embedding.to_float())
    x = torch.tensor([1, 1, 3, 4])
    asymq.calibrate(embedding, [x])
    embedding.weight_quantizer.state = "off"
    assert_bit_equal(embedding(x), plain(x))
    for module in (embedding, plain):
        module(x).sum().backward()
    assert_bit_equal(embedding.weight.grad, plain.weight.grad)

    norm = nn.LayerNorm(12, eps=0.1, bias=False)
    quantized = QuantLayerNorm.from_float(norm, weight=None)
    y = torch.randn(3, 12)
    assert_bit_equal(quantized(y), norm(y))
    bare = QuantLayerNorm.from_float(nn.LayerNorm(12, elementwise_affine=False), weight=None)
    assert_bit_equal(bare(y), nn.functional.layer_norm(y, (12,)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QuantLinear.from_float(nn.Conv2d(1, 1, 1)), "needs nn.Linear or Conv1D, got Conv"),
        (lambda: QuantEmbedding.from_float(nn.Linear(1, 1)), "needs nn.Embedding, got Linear"),
        (lambda: QuantEmbedding.from_float(nn.Embedding(2, 2, max_norm=1.0)), "max_norm"),
        (lambda: QuantEmbedding.from_float(nn.Embedding(2, 2, sparse=True)), "sparse"),
        (lambda: QuantLayerNorm.from_float(nn.BatchNorm1d(1)), "needs nn.LayerNorm, got BatchNorm"),
        (
            lambda: QuantLayerNorm.from_float(nn.LayerNorm(2, elementwise_affine=False)),
            "has no weight to quantize",
        ),
    ],
)
def test_float_layers_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=f"Quant.*: .*{message}"):
        make()


@pytest.mark.parametrize(
    "make, weight",
    [
        (lambda: QuantLinear(12, 8), "4 bits, symmetric, PerChannel(axis=None), beta_gamma"),
        (lambda: QuantEmbedding(20, 12), "4 bits, symmetric, PerChannel(axis=None), beta_gamma"),
        (lambda: QuantLayerNorm(12), "12 bits, PerTensor(), beta_gamma"),
    ],
)
def test_default_quantizers(make, weight):
    layer = make()
    assert layer.weight_quantizer.extra_repr() == f"{weight}, uncalibrated"
    assert layer.output_quantizer is None


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()], ids=str)
def test_empty_activations(granularity, dynamic):
    quantizer = QuantAct(QuantSpec(granularity=granularity, dynamic=dynamic), 12)
    asymq.calibrate(quantizer, [torch.randn(3, 12)])
    x = torch.empty(0, 12, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.shape == (0, 12)
    assert not quantizer.gamma.grad.any()


def test_dynamic_ranges_follow_the_tensor():
    """Without a gradient into the live ends."""
    quantizer = QuantAct(QuantSpec(bits=4, dynamic=True))
    for width in (1.0, 100.0):
        x = (width * torch.randn(50)).requires_grad_()
        one, low, high = torch.ones(1), x.detach().min().view(1), x.detach().max().view(1)
        expected = asymq.fake_quantize_beta_gamma(x.detach(), one, one, low, high, bits=4)
        y = quantizer(x)
        assert_bit_equal(y, expected)
        y.sum().backward()
        assert_bit_equal(x.grad, torch.ones(50))


def test_half_precision_activations_keep_12_bits(device):
    """4,095 steps do not fit bfloat16: codes are computed in float32."""
    quantizer = QuantAct(QuantSpec(bits=12, parameterization="min_max")).to(device)
    x = torch.linspace(-0.5, 1, 5000, device=device).bfloat16()
    asymq.calibrate(quantizer, [x])
    assert_bit_equal(quantizer(x), quantizer(x.float()).bfloat16())


@pytest.mark.parametrize("state", ["quantising", "on", None, True])
def test_a_state_is_one_of_three(state):
    quantizer = QuantAct(QuantSpec(), name="h.0.act")
    message = rf"h\.0\.act: state must be one of quantizing, observing, off, got {state!r}"
    with pytest.raises(ValueError, match=message):
        quantizer.state = state
    assert quantizer.state == "quantizing"


# ---- the scale of range gradients ----------------------------------------------------------------


def _range_gradients(module, x):
    gradients = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    names = (name for name, _ in module.named_parameters())
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("shape", [(5, 7, 12), (9, 7, 12)], ids=str)
@pytest.mark.parametrize(
    "granularity, shared",
    [(PerTensor(), 84), (PerChannel(), 7), (PerGroup(4), 28), (PerToken(), 84), (PerToken(4), 28)],
    ids=str,
)
def test_lsq_scales_an_activations_gradients_by_its_samples(granularity, shared, shape, device):
    """N are the elements of one sample that share a parameter, whatever the batch."""
    x = torch.randn(shape, device=device)
    for symmetric in (False, True):
        spec = QuantSpec(4, symmetric, granularity, link="softplus")
        most = 7 if symmetric else 15
        found = []
        for scale in (None, "lsq", 0.5):
            quantizer = QuantAct(spec.replace(gradient_scale=scale), 12, device=device)
            asymq.calibrate(quantizer, [x])
            found.append(_range_gradients(quantizer, x))
        plain, lsq, half = found
        for name, gradient in plain.items():
            assert gradient.any()
            torch.testing.assert_close(lsq[name], gradient * (shared * most) ** -0.5)
            assert_bit_equal(half[name], gradient * 0.5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_lsq_scales_a_weights_gradients_by_all_that_share_a_range(dynamic, device):
    for granularity, shared in ((PerTensor(), 96), (PerChannel(), 12), (PerGroup(4), 4)):
        spec = QuantSpec(4, True, granularity, dynamic=dynamic)
        found = []
        for scale in (None, "lsq"):
            torch.manual_seed(3)
            layer = QuantLinear(12, 8, weight=spec.replace(gradient_scale=scale)).to(device)
            asymq.calibrate(layer, [torch.ones(2, 12, device=device)])
            with torch.no_grad():
                layer.weight_quantizer.gamma.mul_(0.7)
            found.append(_range_gradients(layer, torch.ones(2, 12, device=device)))
        plain, lsq = (gradients["weight_quantizer.gamma"] for gradients in found)
        torch.testing.assert_close(lsq, plain * (shared * 7) ** -0.5)
        assert_bit_equal(found[0]["weight"], found[1]["weight"])


def test_lsq_is_the_same_in_kernels_that_do_more(device):
    """The rows of logits are no samples."""
    spec = QuantSpec(8, gradient_scale="lsq")
    x = torch.randn(3, 5, 16, device=device, requires_grad=True)
    before, after = (QuantAct(spec, device=device) for _ in range(2))
    asymq.calibrate(before, [x.detach()])
    asymq.calibrate(after, [x.detach()])
    labels = torch.zeros(15, dtype=torch.int64, device=device)
    learned = [*before.parameters(), *after.parameters()]

    def gradients():
        loss = fused.gelu(x, before, after).sum()
        loss = loss + fused.cross_entropy(x, labels, before).sum()
        loss = loss + fused.kl_div(x, x.detach().roll(1), labels, after, 1.0).sum()
        return torch.autograd.grad(loss, learned)

    one = gradients()
    with asymq.use_functions("unfused"):
        several = gradients()
    for a, e in zip(one, several, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parameterization", ["scale_offset", "min_max", "beta_gamma"])
def test_numbers_are_a_range_of_all(parameterization):
    spec = QuantSpec(bits=4, parameterization=parameterization, granularity=PerChannel())
    of_numbers, of_tensors = QuantLinear(3, 2, weight=spec), QuantLinear(3, 2, weight=spec)
    of_numbers.weight_quantizer.set_range(-1, 2.0)
    ends = (torch.full((2, 1), end) for end in (-1.0, 2.0))
    of_tensors.weight_quantizer.set_range(*ends)
    expected = of_tensors.weight_quantizer.state_dict()
    for name, value in of_numbers.weight_quantizer.state_dict().items():
        assert torch.equal(value, expected[name]), name
