"""`prepare`: what it refuses before it changes anything, and models it does not know."""

import re
import warnings

import pytest
import torch
from compare import assert_bit_equal
from tiny_models import FAMILIES, gpt2, logits, opt, prepared, tokens
from torch import nn
from torch.nn import functional as F

import asymq
from asymq import PerChannel, PerGroup, QuantConfig, QuantSpec
from asymq.layers import Quantized, QuantLayer

TABLE2 = QuantConfig.table2("beta_gamma")
ATTENTION = {"gpt2": "transformer.h.1.attn", "opt": "model.decoder.layers.1.self_attn"}
SPEC = QuantSpec()
EVERYTHING = QuantConfig(SPEC, SPEC, SPEC)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 3)
        self.batch_norm = nn.BatchNorm1d(3)

    def forward(self, tokens):
        x = self.convolution(self.embedding(tokens)[:, None])[:, 0]
        return self.batch_norm(F.relu(self.linear(self.norm(x))).mean(1))


def test_a_model_nobody_knows(device):
    model = Net().to(device).eval()
    x = torch.randint(0, 10, (5, 6), device=device)
    expected = model(x).detach()
    with pytest.warns(UserWarning, match="Net is not .* left alone: 1 BatchNorm1d$"):
        assert asymq.prepare(model, EVERYTHING) is model
    assert [(name, q.kind) for name, q in asymq.named_quantizers(model)] == [
        ("embedding.weight_quantizer", "weight"),
        ("convolution.weight_quantizer", "weight"),
        ("convolution.output_quantizer", "activation"),
        ("norm.weight_quantizer", "norm_weight"),
        ("norm.output_quantizer", "activation"),
        ("linear.weight_quantizer", "weight"),
        ("linear.output_quantizer", "activation"),
    ]
    asymq.disable_quantizers(model)
    assert_bit_equal(model(x), expected)
    asymq.calibrate(model, [x])
    assert not torch.equal(model(x), expected)
    model(x).sum().backward()
    for group in asymq.range_parameters(model):
        assert all(p.grad is not None for p in group["params"])


def test_nothing_is_left_alone_silently():
    """Nor is there a warning where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asymq.prepare(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2)), EVERYTHING)
    attention = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="MultiheadAttention, 1 NonDynamicallyQuantizableLinear"):
        asymq.prepare(attention, EVERYTHING)


def test_modules_with_one_weight_share_its_quantizer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    model = asymq.prepare(Tied(), EVERYTHING)
    names = [name for name, _ in asymq.named_quantizers(model)]
    assert names == ["embedding.weight_quantizer", "head.output_quantizer"]
    x = torch.randint(0, 10, (5,))
    asymq.calibrate(model, [x])
    grid = model.embedding.weight_quantizer.fake_quantize(model.embedding.weight)
    assert_bit_equal(model(x), model.head.output_quantizer(grid[x] @ grid.t()))
    asymq.convert(model)
    assert type(model.head) is nn.Linear and model.head.weight is model.embedding.weight
    assert_bit_equal(model.head.weight.detach(), grid.detach())


def test_a_module_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x))

    model = Twice()
    layer = model.first
    asymq.prepare(model, EVERYTHING)
    assert model.first is model.second is layer and type(layer) is asymq.QuantLinear
    x = torch.randn(5, 4)
    asymq.calibrate(model, [x])
    assert_bit_equal(model(x), model.first(model.first(x)))
    asymq.convert(model)
    assert type(model.first) is nn.Linear and model.first is model.second


@pytest.mark.parametrize("make", [gpt2, lambda: opt(layer_norm_elementwise_affine=False)])
def test_ranges_are_where_the_model_is(make):
    model = asymq.prepare(make().to("meta"), TABLE2)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or name.endswith("_extra_state"), name


# ---- refusals ----------------------------------------------------------------------------------

REFUSED = [
    (
        lambda: nn.Sequential(nn.ReLU()),
        TABLE2,
        "Sequential has no Conv1d, Conv2d, .* LayerNorm, Conv1D, RMSNorm or T5LayerNorm layer",
    ),
    (lambda: nn.Sequential(nn.Conv3d(1, 1, 1)), TABLE2, "Sequential has no Conv1d"),
    (gpt2, QuantConfig(None, None, None), "leaves GPT2LMHeadModel no quantizer"),
    (gpt2, QuantConfig(SPEC, None, None, skip=("*",)), "leaves GPT2LMHeadModel no quantizer"),
    (
        gpt2,
        QuantConfig(SPEC, SPEC, SPEC, overrides={"*.h.0.*": None, "*.h.7.*": None}),
        r"no quantizer of GPT2LMHeadModel is called \*\.h\.7\.\*; they are called transformer\.wte",
    ),
    (
        opt,
        QuantConfig(SPEC, SPEC, SPEC, overrides={"model.*": SPEC}, skip=("head*", "x", "lm_head*")),
        r"no quantizer of OPTForCausalLM is called head\*, x;",
    ),
    (
        gpt2,
        QuantConfig(QuantSpec(granularity=PerGroup(5)), SPEC, SPEC),
        r"transformer\.wte\.weight_quantizer: groups of 5 do not divide an axis of 32",
    ),
    (
        opt,
        QuantConfig(SPEC, QuantSpec(granularity=PerGroup(64)), SPEC),
        "_quantizer: groups of 64 do not divide an axis of 32",
    ),
    (
        gpt2,
        QuantConfig(SPEC, QuantSpec(granularity=PerChannel()), SPEC),
        r"transformer\.h\.0\.attn\.scores_quantizer: .* needs an axis of known size",
    ),
    (
        gpt2,
        QuantConfig(SPEC, SPEC, QuantSpec(granularity=PerChannel(1))),
        r"transformer\.h\.0\.ln_1\.weight_quantizer: axis must be in \[-1, 1\), got 1",
    ),
    (
        gpt2,
        QuantConfig(None, QuantSpec(dynamic=True), None),
        r"transformer\.h\.0.*_quantizer is dynamic: .*allow_lookahead=True",
    ),
    (
        opt,
        QuantConfig(SPEC, SPEC, SPEC, overrides={"*.scores_quantizer": QuantSpec(dynamic=True)}),
        r"layers\.0\.self_attn\.scores_quantizer is dynamic",
    ),
    (lambda: gpt2(add_cross_attention=True), TABLE2, "GPT2LMHeadModel with cross attention"),
    (lambda: gpt2(reorder_and_upcast_attn=True), TABLE2, "with reorder_and_upcast_attn"),
]


@pytest.mark.parametrize("make, config, message", REFUSED)
def test_refusals_change_nothing(make, config, message):
    model = make()
    before = repr(model), list(model.state_dict()), [type(m) for m in model.modules()]
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(ValueError, match=message):
        asymq.prepare(model, config)
    assert (repr(model), list(model.state_dict()), [type(m) for m in model.modules()]) == before
    assert not model._forward_hooks and not model._load_state_dict_pre_hooks
    assert not hasattr(model, "_asymq")
    if attention is not None:
        assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_prepare(family):
    model = prepared(FAMILIES[family]())
    before = logits(model, tokens())
    with pytest.raises(ValueError, match="has quantizers already"):
        asymq.prepare(model, TABLE2)
    assert_bit_equal(logits(model, tokens()), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_ranges_where_they_are_allowed(family, device):
    dynamic = QuantSpec(bits=8, dynamic=True)
    config = QuantConfig(dynamic, dynamic, dynamic)
    model = asymq.prepare(FAMILIES[family]().to(device), config, allow_lookahead=True)
    result = model(tokens().to(device))  # known at once, without calibration
    result.logits.square().mean().backward()
    for group in asymq.range_parameters(model):
        assert all(p.grad.isfinite().all() for p in group["params"])
    # Dynamic weights see no tokens.
    asymq.prepare(FAMILIES[family](), QuantConfig(dynamic, SPEC, SPEC))


@pytest.mark.parametrize("family", FAMILIES)
def test_uncalibrated_use(family):
    model = asymq.prepare(FAMILIES[family](), TABLE2)
    first = next(name for name, q in asymq.named_quantizers(model) if q.kind == "weight")
    with pytest.raises(RuntimeError, match=f"{re.escape(first)}: .*calibrate"):
        model(tokens())
    asymq.disable_quantizers(model)
    model(tokens())


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(4), PerGroup(2, axis=0)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_granularities_of_weights(family, granularity, device):
    weight = QuantSpec(4, True, granularity, "min_max")
    model = prepared(FAMILIES[family]().to(device), QuantConfig(weight, SPEC, None))
    for _, quantizer in asymq.named_quantizers(model):
        if quantizer.kind == "weight":
            assert quantizer.max.dim() == 2 and quantizer.max.numel() > 1
    model(tokens().to(device)).logits.sum().backward()


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(8)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_granularities_of_activations(family, granularity, device):
    """All but scores and probabilities have an axis of a known size."""
    spec = QuantSpec(8, granularity=granularity, parameterization="min_max")
    tokens_alone = {"*.scores_quantizer": SPEC, "*.probabilities_quantizer": SPEC}
    config = QuantConfig(None, spec, None, overrides=tokens_alone)
    model = prepared(FAMILIES[family]().to(device), config)
    name = ATTENTION[family]
    ranges = 32 if granularity == PerChannel() else 4
    assert model.get_submodule(f"{name}.context_quantizer").max.shape == (ranges,)
    model(tokens().to(device)).logits.sum().backward()


# ---- what surrounds a prepared model -----------------------------------------------------------


def test_models_that_share_a_configuration():
    """A float teacher beside its quantized student."""
    student = gpt2()
    teacher = type(student)(student.config).eval()
    expected = logits(teacher, tokens())
    prepared(student)
    assert_bit_equal(logits(teacher, tokens()), expected)
    assert teacher.config._attn_implementation != student.config._attn_implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_base_models_are_causal_too(family):
    model = FAMILIES[family]().base_model
    config = QuantConfig(None, QuantSpec(dynamic=True), None)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="allow_lookahead"):
        asymq.prepare(model, config)


def test_the_fast_path_of_transformer_encoders_is_not_taken():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        asymq.prepare(model, EVERYTHING)
    asymq.calibrate(model, [x])
    assert all(quantizer.calibrated for _, quantizer in asymq.named_quantizers(model))
    with torch.no_grad():
        without_gradient = model(x)
    assert_bit_equal(without_gradient, model(x).detach())


def test_a_replaced_forward_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    forward = model[0].forward
    model[0].forward = lambda x: forward(x)
    with pytest.raises(ValueError, match="0: the forward of this Linear has been replaced"):
        asymq.prepare(model, EVERYTHING)


def test_a_weight_of_another_shape_is_named():
    model = prepared(gpt2())
    model.transformer.wpe.weight = nn.Parameter(torch.randn(64, 32))
    with pytest.raises(RuntimeError, match=r"transformer\.wpe\.weight_quantizer: its weight had"):
        logits(model, tokens())


def test_channels_that_change_are_named():
    quantizer = asymq.QuantAct(QuantSpec(granularity=PerChannel()), 4, name="gate")
    with pytest.raises(RuntimeError, match=r"gate: axis 1 .* 4 channels, got shape \[1, 8\]"):
        asymq.calibrate(quantizer, [torch.randn(1, 8)])


def test_activations_have_channels_on_the_last_axis_alone():
    config = QuantConfig(None, QuantSpec(granularity=PerChannel(axis=1)), None)
    with pytest.raises(ValueError, match=r"input_quantizer: .*last axis"):
        asymq.prepare(gpt2(), config)


def test_masks_of_four_dimensions():
    model, batch = prepared(gpt2()), tokens()
    expected = logits(model, batch)
    seen = torch.ones(2, 1, 12, 12).tril()
    added = (1 - seen) * torch.finfo(torch.float32).min
    assert_bit_equal(logits(model, batch, attention_mask=seen.bool()), expected)
    assert_bit_equal(logits(model, batch, attention_mask=added), expected)
    with pytest.raises(ValueError, match=r"must be bool .* or floating point"):
        logits(model, batch, attention_mask=seen.long())


def test_calibration_names_what_it_did_not_reach():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    model = asymq.prepare(Half(), QuantConfig(None, SPEC, None))
    with pytest.warns(UserWarning, match="no data reached unused.output_quantizer;"):
        asymq.calibrate(model, [torch.randn(2, 3)])


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.LayerNorm(4)])
def test_a_layer_alone(make):
    name = type(make()).__name__
    with pytest.raises(ValueError, match=rf"{name} is a layer itself.*nn\.Sequential\({name}"):
        asymq.prepare(make(), EVERYTHING)


def test_arguments_of_other_types():
    model = nn.Sequential(nn.Linear(4, 4))
    hint = r"config must be a QuantConfig, got str: QuantConfig\.table2\('beta_gamma'\)"
    with pytest.raises(ValueError, match=hint):
        asymq.prepare(model, "beta_gamma")
    with pytest.raises(ValueError, match="config must be a QuantConfig, got QuantSpec"):
        asymq.prepare(model, SPEC)
    with pytest.raises(ValueError, match=r"model must be an nn\.Module, got str"):
        asymq.prepare("gpt2", TABLE2)
    with pytest.raises(ValueError, match="leaves Sequential no quantizer"):
        asymq.prepare(model, QuantConfig())


def test_kinds_select_in_a_model():
    config = QuantConfig(SPEC, None, SPEC, {"weight:*h.0.*": QuantSpec(2, symmetric=True)})
    quantizers = dict(asymq.named_quantizers(asymq.prepare(gpt2(), config)))
    assert quantizers["transformer.h.0.mlp.c_fc.weight_quantizer"].spec.bits == 2
    assert quantizers["transformer.h.0.ln_1.weight_quantizer"].spec == SPEC


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("functions", ["operators", "unfused"])
def test_finite_masks_hide(functions, value):
    """Not even where the lower end of the probabilities' range is above 0."""
    model, batch = prepared(gpt2(), "min_max"), tokens()
    for name, quantizer in asymq.named_quantizers(model):
        if name.endswith("probabilities_quantizer"):
            quantizer.set_range(torch.tensor([0.02]), torch.tensor([1.0]))
    mask = torch.zeros(2, 1, 12, 12).masked_fill(
        ~torch.ones(12, 12, dtype=torch.bool).tril(), value
    )
    changed = batch.clone()
    changed[:, -1] = (changed[:, -1] + 7) % 96
    with asymq.use_functions(functions):
        first, second = (logits(model, b, attention_mask=mask) for b in (batch, changed))
    assert_bit_equal(first[:, :-1], second[:, :-1])


def test_small_biases_are_scores():
    """ALiBi's."""
    model, batch = prepared(gpt2(), "min_max"), tokens()
    distance = (torch.arange(12)[:, None] - torch.arange(12)).float()
    hidden = ~torch.ones(12, 12, dtype=torch.bool).tril()
    bias = (-50 * distance).masked_fill(hidden, -1e4).expand(2, 1, 12, 12)
    plain = torch.zeros(2, 1, 12, 12).masked_fill(hidden, -1e4)
    results = []
    for functions in ("operators", "unfused"):
        with asymq.use_functions(functions):
            results.append(logits(model, batch, attention_mask=bias))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not torch.equal(results[0], logits(model, batch, attention_mask=plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_gets_no_quantizer_stays(family):
    """Attention too, whose implementation goes on: weights alone need no scores."""
    model = FAMILIES[family]()
    implementation = model.config._attn_implementation
    expected = logits(model, tokens())
    asymq.prepare(model, QuantConfig(weight=QuantSpec(4, True, PerChannel())))
    assert model.config._attn_implementation == implementation == "sdpa"
    quantized = {name for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    assert quantized == {
        name.removesuffix(".weight_quantizer")
        for name, _ in model.named_modules(remove_duplicate=False)
        if name.endswith(".weight_quantizer")
    }
    assert not isinstance(model.get_submodule(ATTENTION[family]), Quantized)
    asymq.disable_quantizers(model)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-6, atol=1e-6)
    asymq.calibrate(model, [tokens()])
    before = logits(model, tokens())
    asymq.convert(model)
    torch.testing.assert_close(logits(model, tokens()), before, rtol=1e-6, atol=1e-6)


def test_a_layer_with_quantizers_of_its_own_stays():
    model = gpt2()
    own = QuantSpec(3, True)
    c_proj = model.transformer.h[0].mlp.c_proj
    model.transformer.h[0].mlp.c_proj = asymq.QuantLinear.from_float(c_proj, weight=own)
    asymq.prepare(model, TABLE2)
    quantizer = model.transformer.h[0].mlp.c_proj.weight_quantizer
    assert quantizer.spec == own and quantizer.name == "transformer.h.0.mlp.c_proj.weight_quantizer"
    asymq.calibrate(model, [tokens()])
    assert quantizer.calibrated


def test_a_calibration_that_fails_leaves_the_first_forward_to_say_it():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    model = asymq.prepare(Half(), QuantConfig(weight=QuantSpec(dynamic=True)))
    with pytest.raises(ValueError, match="needs at least one batch"):
        asymq.calibrate(model, [])
    with pytest.warns(UserWarning, match=r"first forward .* did not use unused\.weight_quantizer"):
        model(torch.randn(2, 3))
