"""`convert_parameterization`, `convert` and `summary`."""

import copy
import itertools
import warnings

import pytest
import torch
from compare import assert_bit_equal
from tiny_models import FAMILIES, SETTINGS, gpt2, logits, prepared, tokens, train
from torch import nn

import asymq
from asymq import PerChannel, PerGroup, QuantAct, QuantConfig, QuantSpec
from asymq.quantizers.spec import NAMES

SPECS = {name: QuantSpec(bits=12).with_parameterization(name) for name in SETTINGS}


def ulps(actual, expected):
    """Distance in steps of float32."""
    actual, expected = (t.detach().view(torch.int32).long() for t in (actual, expected))
    return (actual - expected).abs()


def ranges(count=200):
    """Ends that contain 0, from narrow to wide, one-sided and tied ones among them."""
    size = torch.logspace(-4, 4, count)
    low, high = -size * torch.rand(count), size * torch.rand(count)
    low[::7], high[3::7] = 0, 0
    low[1::7], high[1::7] = -size[1::7], size[1::7]  # z is a tie
    return low, high


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("start, to", list(itertools.product(NAMES, NAMES)))
def test_the_range_is_kept(start, to, bits, symmetric, device):
    if symmetric and start == "kscale_koffset":
        start = "scale_offset"
    spec = QuantSpec(bits, symmetric, PerChannel()).with_parameterization(start)
    low, high = ranges()
    quantizer = QuantAct(spec, len(low)).to(device)
    quantizer.set_range(low.to(device), high.to(device))
    with torch.no_grad():  # away from the first values, as training leaves it
        for parameter in quantizer.parameters():
            parameter.mul_(0.9)
    s, z = quantizer.scale_offset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asymq.convert_parameterization(quantizer, to)
    assert quantizer.spec == spec.with_parameterization(to)
    new_s, new_z = quantizer.scale_offset()
    # A link rounds once more.
    linked = quantizer.spec.link != "identity" or spec.link != "identity"
    assert ulps(new_s, s).max() <= (8 if linked else 4)
    if symmetric:
        assert new_z is None and z is None
    else:
        assert_bit_equal(new_z.round() + 0.0, z.round() + 0.0)
    learned = set(dict(quantizer.named_parameters()))
    assert learned == set(QuantAct(quantizer.spec, len(low)).learned)
    first = {
        "beta_gamma": 1.0,
        "beta_gamma_sigmoid": 4.0,
        "beta_gamma_exp": 0.0,
        "beta_gamma_clamp": 1.0,
    }.get(to)
    for name in learned:
        value = getattr(quantizer, name)
        assert_bit_equal(getattr(quantizer, f"initial_{name}"), value.detach())
        assert value.device.type == device.type
        if first is not None:
            assert (value == first).all()


@pytest.mark.parametrize("to", SETTINGS)
@pytest.mark.parametrize("low, high", [(0.5, 2.0), (-3.0, -1.0)])
def test_a_range_without_zero_warns(low, high, to):
    quantizer = QuantAct(SPECS["min_max"], name="h.0.act")
    quantizer.set_range(torch.tensor([low]), torch.tensor([high]))
    s = quantizer.scale_offset()[0]
    with pytest.warns(UserWarning, match=r"h\.0\.act: the range does not contain 0"):
        asymq.convert_parameterization(quantizer, to)
    bounds = [end.item() for end in quantizer.bounds()]
    assert bounds == pytest.approx([low, high], abs=1.01 * s.item())


@pytest.mark.parametrize("start, to", list(itertools.permutations(SETTINGS, 2)))
def test_models_compute_the_same(start, to, device):
    model = prepared(gpt2().to(device), start)
    train(model, 2, 1e-4)
    batch = tokens().to(device)
    expected = logits(model, batch)
    names = [name for name, _ in asymq.named_quantizers(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranges of LayerNorm weights need not contain 0
        asymq.convert_parameterization(model, to)
    assert [name for name, _ in asymq.named_quantizers(model)] == names
    error = (logits(model, batch) - expected).abs().max() / expected.abs().max()
    assert error < 2e-3
    # The new parameters learn.
    quantizers = [quantizer for _, quantizer in asymq.named_quantizers(model)]
    before = [[p.clone() for p in quantizer.parameters()] for quantizer in quantizers]
    train(model, 1, 1e-3)
    for quantizer, values in zip(quantizers, before, strict=True):
        assert any((p != v).any() for p, v in zip(quantizer.parameters(), values, strict=True))


def test_uncalibrated_quantizers_convert():
    quantizer = QuantAct(SPECS["min_max"])
    asymq.convert_parameterization(quantizer, "beta_gamma")
    assert not quantizer.calibrated and quantizer.gamma.isnan().all()


def test_fix_min_stays_where_there_is_a_minimum():
    quantizer = QuantAct(QuantSpec(parameterization="min_max", fix_min=True))
    quantizer.set_range(torch.tensor([-1.0]), torch.tensor([2.0]))
    asymq.convert_parameterization(quantizer, "beta_gamma_sigmoid")
    assert quantizer.learned == ("gamma",) and quantizer.spec.fix_min
    assert [e.item() for e in quantizer.bounds()] == pytest.approx([-1, 2], rel=0.01)


@pytest.mark.parametrize(
    "spec, to, message",
    [
        (QuantSpec(), "gamma", "0: .*unknown parameterization 'gamma'"),
        (QuantSpec(dynamic=True), "beta_gamma", "1: has a dynamic range"),
        (QuantSpec(dynamic=True), "min_max", "1: has a dynamic range"),
        (QuantSpec(fix_min=True), "scale_offset", "1: .*fix_min belongs to"),
    ],
)
def test_conversions_that_cannot_be(spec, to, message):
    model = nn.Sequential(QuantAct(QuantSpec(parameterization="min_max")), QuantAct(spec))
    asymq.calibrate(model, [torch.randn(9)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"asymq.convert_parameterization: {message}"):
        asymq.convert_parameterization(model, to)
    for name, value in model.state_dict().items():
        assert_bit_equal(value, before[name])
    with pytest.raises(ValueError, match="no quantizers"):
        asymq.convert_parameterization(nn.Linear(2, 2), "min_max")


# ---- convert -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_convert_leaves_a_plain_model(family, setting, device):
    original = FAMILIES[family]().to(device)
    model = prepared(copy.deepcopy(original), setting)
    train(model, 2, 1e-3)
    grid = {
        name.removesuffix("_quantizer"): (q, q.fake_quantize(model.get_parameter(name[:-10])))
        for name, q in asymq.named_quantizers(model)
        if q.kind != "activation"
    }
    for _, quantizer in asymq.named_quantizers(model):
        if quantizer.kind == "activation":
            quantizer.state = "off"
    batch = tokens().to(device)
    expected = logits(model, batch)
    assert asymq.convert(model) is model

    assert not any(asymq.named_quantizers(model))
    assert repr(model) == repr(original)
    plain = [(name, type(m)) for name, m in original.named_modules()]
    assert [(name, type(m)) for name, m in model.named_modules()] == plain
    assert model.config._attn_implementation == original.config._attn_implementation
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._load_state_dict_pre_hooks
        assert not any("asymq" in str(v) for v in module._forward_hooks.values())
        assert not any("quant" in key or "asymq" in key for key in vars(module))
    assert list(model.state_dict()) == list(original.state_dict())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    for name, (quantizer, values) in grid.items():
        weight = model.get_parameter(name)
        assert_bit_equal(weight.detach(), values.detach())
        # A fixed point: what is on the grid stays there.
        assert_bit_equal(quantizer.fake_quantize(weight).detach(), values.detach())
        assert not torch.equal(weight, original.get_parameter(name))
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    for name, bias in biases.items():
        assert_bit_equal(bias.detach(), original.get_parameter(name).detach())
    error = (logits(model, batch) - expected).abs().max() / expected.abs().max()
    assert error <= 2e-6
    original.load_state_dict(model.state_dict())
    asymq.calibrate(asymq.prepare(model, QuantConfig.table2("min_max")), [batch])


def test_convert_keeps_the_dtype():
    model = prepared(gpt2()).to(torch.bfloat16)
    asymq.convert(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_convert_that_cannot_be():
    with pytest.raises(ValueError, match=r"asymq\.convert: the model has no quantizers"):
        asymq.convert(gpt2())
    uncalibrated = asymq.prepare(gpt2(), QuantConfig.table2("min_max"))
    before = repr(uncalibrated)
    with pytest.raises(RuntimeError, match=r"transformer\.wte\.weight_quantizer: .*calibrate"):
        asymq.convert(uncalibrated)
    assert repr(uncalibrated) == before


# ---- summary -----------------------------------------------------------------------------------


def test_summary():
    class Model(nn.Sequential):
        def forward(self, x):
            return x

    def act(low, high, **options):
        quantizer = QuantAct(QuantSpec(bits=2, **options), 4)
        if low is not None:
            quantizer.set_range(torch.tensor(low), torch.tensor(high))
        return quantizer

    model = Model(
        act([-1.0], [2.0]),
        act([-1.0, -4.0, 0.0, 0.0], [2.0, 2.0, 0.0, 1.0], granularity=PerChannel()),
        act([0.0], [1.5], symmetric=True, parameterization="min_max"),
        act(None, None, granularity=PerGroup(2, axis=1), sigmoid=True, fix_min=True),
        act(None, None, dynamic=True),
        nn.Linear(2, 2),
    )
    assert asymq.summary(model) == "\n".join(
        [
            "name  kind        bits  granularity          parameterization            "
            "range                           collapsed",
            "----  ----------  ----  -------------------  --------------------------  "
            "------------------------------  ---------",
            "0     activation  2     per tensor           beta_gamma                  "
            "[-1, 2]                         no",
            "1     activation  2     per channel          beta_gamma                  "
            "4 ranges within [-4, 2]         1 of 4",
            "2     activation  2     per tensor           symmetric min_max           "
            "[-1, 1]                         no",
            "3     activation  2     groups of 2, axis 1  beta_gamma sigmoid fix_min  "
            "uncalibrated                    -",
            "4     activation  2     per tensor           beta_gamma dynamic          "
            "dynamic range, beta 1, gamma 1  -",
            "",
            "not quantized: 6 of 6 parameters (100.00%): 5.weight, 5.bias",
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_summary_of_a_model(family):
    model = prepared(FAMILIES[family]())
    table, notes = asymq.summary(model).split("\n\n")
    head, _, *rows = table.splitlines()
    assert head.split() == ("name kind bits granularity parameterization range collapsed".split())
    named = dict(asymq.named_quantizers(model))
    assert [row.split()[0] for row in rows] == list(named)
    assert [row.split()[1] for row in rows] == [q.kind for q in named.values()]
    assert all(row.endswith(" no") for row in rows)
    shared, left = notes.splitlines()
    embedding = model.get_input_embeddings().weight_quantizer.name
    assert shared == f"{embedding}: one weight with lm_head.weight_quantizer"
    assert "not quantized: " in left and ".*." in left and left.endswith(".bias")
    with torch.no_grad():
        quantizer = model.get_input_embeddings().weight_quantizer
        quantizer.gamma[:3] = torch.tensor([[-1.0], [0.0], [1e-9]])
    (row,) = (r for r in asymq.summary(model).splitlines() if r.startswith(f"{quantizer.name}  "))
    assert row.endswith(f" 3 of {quantizer.gamma.numel()}")
