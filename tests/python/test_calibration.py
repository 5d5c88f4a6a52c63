"""First ranges: their values, what is observed, and what an error leaves behind."""

import copy
import math

import pytest
import torch
from compare import assert_bit_equal
from tiny_models import FAMILIES, gpt2, logits, prepared, tokens
from torch import nn

import asymq
from asymq import PerChannel, QuantAct, QuantConfig, QuantLayerNorm, QuantLinear, QuantSpec


def ends(quantizer):
    return tuple(end.item() for end in (quantizer.min, quantizer.max))


def calibrated(spec, *batches, **options):
    quantizer = QuantAct(spec)
    asymq.calibrate(quantizer, [torch.tensor(batch) for batch in batches], **options)
    return quantizer


# A range of [-2, 6] with k = 15; symmetric [-6, 6].
FIRST_VALUES = [
    ({"parameterization": "scale_offset"}, {"scale": 8 / 15, "offset": -3.75}),
    ({"parameterization": "min_max"}, {"min": -2, "max": 6}),
    ({"parameterization": "min_max", "fix_min": True}, {"min": -2, "max": 6}),
    ({}, {"beta": 1, "gamma": 1, "min": -2, "max": 6}),
    ({"fix_min": True}, {"beta": 1, "gamma": 1, "min": -2, "max": 6}),
    ({"sigmoid": True}, {"beta": 4, "gamma": 4, "min": -2, "max": 6}),
    ({"dynamic": True}, {"beta": 1, "gamma": 1}),
    ({"dynamic": True, "sigmoid": True}, {"beta": 4, "gamma": 4}),
    ({"parameterization": "kscale_koffset"}, {"kscale": 8, "koffset": -0.25}),
    ({"parameterization": "scale_offset", "symmetric": True}, {"scale": 0.8}),
    ({"parameterization": "min_max", "symmetric": True}, {"max": 6}),
    ({"symmetric": True}, {"gamma": 1, "max": 6}),
    ({"symmetric": True, "sigmoid": True}, {"gamma": 4, "max": 6}),
]


@pytest.mark.parametrize("options, expected", FIRST_VALUES, ids=str)
def test_first_values(options, expected):
    quantizer = calibrated(QuantSpec(bits=4, **options), [1.0, -2.0], [6.0, 0.0])
    tensors = quantizer.range_tensors()
    assert {name for name in tensors if not name.startswith("initial_")} == set(expected)
    for name, value in expected.items():
        assert tensors[name].item() == pytest.approx(value, rel=1.2e-7), name
        if name in quantizer.learned:
            assert_bit_equal(tensors[f"initial_{name}"], tensors[name].detach())
    assert quantizer.calibrated and quantizer.state == "quantizing"


@pytest.mark.parametrize(
    "values, force_zero, expected",
    [
        ([1.0, 3.0], True, (0, 3)),
        ([1.0, 3.0], False, (1, 3)),
        ([-3.0, -1.0], True, (-3, 0)),
        ([-3.0, -1.0], False, (-3, -1)),
        ([-1.0, 3.0], True, (-1, 3)),
        ([2.0, 2.0], True, (0, 2)),
        ([5e-7, 0.0], True, (0, 5e-7)),
        ([-5e-7, 0.0], True, (-5e-7, 0)),
        ([0.25, 0.25], False, (0, 0.25)),  # one value says nothing but its distance from 0
        ([0.25, 0.2501], False, (0.25, 0.2501)),
    ],
)
def test_ends_of_activations(values, force_zero, expected):
    spec = QuantSpec(bits=4, parameterization="min_max")
    quantizer = calibrated(spec, values, force_zero=force_zero)
    assert ends(quantizer) == pytest.approx(expected, rel=1.2e-7, abs=1e-13)


@pytest.mark.parametrize("bits, eps", [(8, 1e-8), (16, 1e-4), (2, 1e-8)])
def test_no_range_is_within_the_guard(bits, eps):
    """k·eps wide at least, so that no scale is held by eps."""
    spec = QuantSpec(bits=bits, eps=eps, parameterization="min_max")
    with pytest.warns(UserWarning, match="QuantAct have no width"):
        quantizer = calibrated(spec, [0.0, spec.steps * eps / 10])
    assert ends(quantizer) == pytest.approx((0, spec.steps * eps), rel=1.2e-7)


@pytest.mark.parametrize("symmetric", [False, True])
def test_data_without_width_are_named(symmetric):
    spec = QuantSpec(symmetric=symmetric, parameterization="min_max")
    with pytest.warns(UserWarning, match="have no width"):
        quantizer = calibrated(spec, [0.0, 0.0])
    assert quantizer.max.item() == 1


def test_symmetric_activations():
    spec = QuantSpec(symmetric=True, parameterization="min_max")
    assert calibrated(spec, [-7.0, 2.0]).max.item() == 7
    assert calibrated(spec, [1.0, 2.0], force_zero=False).max.item() == 2


def test_a_channel_of_zeros():
    quantizer = QuantAct(QuantSpec(granularity=PerChannel(), parameterization="min_max"), 3)
    asymq.calibrate(quantizer, [torch.tensor([[0.0, 1.0, -3.0], [0.0, 2.0, -1.0]])])
    # Of a channel that says nothing the others speak.
    expected = torch.tensor([[-3.0, 0, -3], [3, 2, 0]])
    torch.testing.assert_close(
        torch.stack([quantizer.min, quantizer.max]).detach(), expected, rtol=1.2e-7, atol=0
    )


def test_symmetric_weights():
    layer = QuantLinear(3, 3, weight=QuantSpec(4, True, PerChannel(), "min_max"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-9, 0, 0]]))
    asymq.calibrate(layer, [torch.randn(2, 3)])
    # A row of zeros gets the widest row's range, a tiny one its own, if eps lets it.
    expected = torch.tensor([[2.0], [2.0], [15e-8 / 2]])
    torch.testing.assert_close(layer.weight_quantizer.max.detach(), expected, rtol=1.2e-7, atol=0)


def test_asymmetric_weights():
    layer = QuantLinear(2, 2, weight=QuantSpec(4, False, PerChannel(), "min_max"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))
    for force_zero, low in ((True, 0.0), (False, 1.0)):
        asymq.calibrate(layer, [torch.randn(2, 2)], force_zero=force_zero)
        quantizer = layer.weight_quantizer
        assert_bit_equal(quantizer.min.detach(), torch.tensor([[low], [-3.0]]))
        assert_bit_equal(quantizer.max.detach(), torch.tensor([[2.0], [1.0]]))


@pytest.mark.parametrize(
    "weight, expected",
    [
        ([0.5, 2.0], (0.5, 2.0)),
        ([-0.5, 2.0], (-0.5, 2.0)),
        ([1.0, 1.0], (0.0, 1.0)),
        ([-1.0, -1.0], (-1.0, 0.0)),
        ([0.0, 0.0], (-1.0, 1.0)),  # Gemma's, whose norms multiply with 1 + w
    ],
)
def test_norm_weights(weight, expected):
    """Their own ends; zero only where they have no width, as in a fresh model."""
    norm = QuantLayerNorm(2, weight=QuantSpec(12, parameterization="min_max"))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weight))
    asymq.calibrate(norm, [torch.randn(3, 2)])
    assert ends(norm.weight_quantizer) == pytest.approx(expected, rel=1.2e-7)


# ---- what is observed --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_quantized_meanwhile_and_norm_weights_are_not(family, device):
    float_model = FAMILIES[family]().to(device)
    model = prepared(copy.deepcopy(float_model), "min_max")
    seen = []
    for _, quantizer in asymq.named_quantizers(model):
        if quantizer.kind == "norm_weight":
            quantizer.state = "off"
        if quantizer.kind == "activation":
            quantizer.start_observing()
            seen.append(quantizer)
    for seed in (3, 4):
        logits(model, tokens(seed=seed).to(device))
    for quantizer in seen:
        low, high = quantizer.take_observed()
        assert_bit_equal(quantizer.min.detach(), low.clamp(max=0))
        assert_bit_equal(quantizer.max.detach(), high.clamp(min=0))


def test_scores_of_future_tokens_count(device):
    model = gpt2().to(device)
    asymq.prepare(model, QuantConfig(None, QuantSpec(parameterization="min_max"), None))
    batch = tokens(seed=0).to(device)
    captured = {}
    attention = model.transformer.h[0].attn
    attention.c_attn.register_forward_hook(lambda *args: captured.update(c_attn=args[-1]))
    asymq.calibrate(model, [batch])
    asymq.disable_quantizers(model)
    model(batch)
    query, key, _ = (
        part.view(*batch.shape, 4, 8).transpose(1, 2) for part in captured["c_attn"].split(32, -1)
    )
    scores = query @ key.transpose(-1, -2) / 8**0.5
    quantizer = attention.scores_quantizer
    for end, expected in ((quantizer.min, scores.min()), (quantizer.max, scores.max())):
        torch.testing.assert_close(end[0], expected, rtol=1e-6, atol=0)
    visible = scores.masked_select(torch.ones_like(scores, dtype=torch.bool).tril())
    assert visible.max() < scores.max() or visible.min() > scores.min()
    low, high = ends(attention.probabilities_quantizer)
    assert low == 0 and 0.9 < high <= 1 + 1e-6


def test_batches_may_be_tensors_or_dicts():
    first, second = gpt2(), gpt2()
    for model in (first, second):
        asymq.prepare(model, QuantConfig.table2("min_max"))
    asymq.calibrate(first, [tokens(), tokens(seed=5)])
    asymq.calibrate(second, iter([{"input_ids": tokens()}, {"input_ids": tokens(seed=5)}]))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_calibration_starts_afresh(family, device):
    model = prepared(FAMILIES[family]().to(device), "min_max")
    with torch.no_grad():
        for group in asymq.range_parameters(model):
            for parameter in group["params"]:
                parameter.mul_(3)
    asymq.calibrate(model, [tokens(1, 4)])
    fresh = asymq.prepare(FAMILIES[family]().to(device), QuantConfig.table2("min_max"))
    asymq.calibrate(fresh, [tokens(1, 4)])
    for name, value in fresh.state_dict().items():
        assert_bit_equal(model.state_dict()[name], value)


def test_calibration_leaves_training_modes_and_gradients():
    model = asymq.prepare(gpt2(), QuantConfig.table2("min_max"))
    model.train()
    model.transformer.h[1].attn.eval()
    modes = [module.training for module in model.modules()]
    asymq.calibrate(model, [tokens()])
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    evaluated = prepared(gpt2(), "min_max")
    asymq.calibrate(evaluated, [tokens()])
    for a, b in zip(model.state_dict().values(), evaluated.state_dict().values(), strict=True):
        assert_bit_equal(a, b)  # no dropout while calibrating


def test_a_quantizer_without_data_stays_as_it_was():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = QuantAct(QuantSpec()), QuantAct(QuantSpec())

        def forward(self, x):
            return self.used(x)

    model = Branches()
    asymq.calibrate(model, [torch.randn(3)])
    assert model.used.calibrated and not model.unused.calibrated
    with pytest.raises(RuntimeError, match="calibrate"):
        model.unused(torch.randn(3))


# ---- errors ------------------------------------------------------------------------------------


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [(q.state, q.calibrated) for _, q in asymq.named_quantizers(model)]


def broken_weight(model, value):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = value


def broken_bias(model, value):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[0] = value


@pytest.mark.parametrize("calibrate_first", [False, True], ids=["fresh", "calibrated"])
@pytest.mark.parametrize(
    "break_it, batches, message",
    [
        (None, [], "needs at least one batch, got none"),
        (None, [tokens(), 3], "a batch must be a tensor or a dict .* got int"),
        (
            lambda model: broken_weight(model, math.inf),
            [tokens()],
            r"transformer\.h\.1\.mlp\.c_fc\.weight_quantizer: the weight has NaN or infinite",
        ),
        *(
            (
                lambda model, value=value: broken_bias(model, value),
                [tokens()],
                r"transformer\.h\.1\.mlp\.c_fc\.output_quantizer: an activation has NaN or inf",
            )
            for value in (math.nan, math.inf, -math.inf)
        ),
    ],
)
def test_an_error_changes_nothing(break_it, batches, message, calibrate_first):
    model = asymq.prepare(gpt2(), QuantConfig.table2("beta_gamma"))
    if calibrate_first:
        asymq.calibrate(model, [tokens(seed=9)])
        asymq.disable_quantizers(model)
    if break_it is not None:
        break_it(model)
    state, flags = snapshot(model)
    with pytest.raises(ValueError, match=f"asymq.calibrate: {message}"):
        asymq.calibrate(model, batches)
    after, flags_after = snapshot(model)
    for name, value in state.items():
        assert_bit_equal(after[name], value)
    assert flags_after == flags


def test_an_error_of_the_model_changes_nothing():
    model = prepared(gpt2())
    state, flags = snapshot(model)
    with pytest.raises(IndexError):
        asymq.calibrate(model, [tokens(seed=8), tokens() + 1000])
    after, flags_after = snapshot(model)
    for name, value in state.items():
        assert_bit_equal(after[name], value)
    assert flags_after == flags


def test_a_model_without_quantizers():
    with pytest.raises(ValueError, match="no quantizers; call asymq"):
        asymq.calibrate(nn.Linear(2, 2), [torch.randn(2, 2)])


# ---- data that say nothing -----------------------------------------------------------------------


def jointly_trained(model, config, steps=200):
    """The README's joint training: the last loss, and whether every parameter moved."""
    torch.manual_seed(5)
    x = torch.randn(256, 16)
    y = x.square().mean(1, keepdim=True)
    asymq.prepare(model, config)
    with pytest.warns(UserWarning, match="have no width"):
        asymq.calibrate(model, [x])
    weights = asymq.weight_parameters(model)
    groups = [{"params": weights, "lr": 1e-2}, *asymq.range_parameters(model, lr=1e-3)]
    optimizer = torch.optim.Adam(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item(), nn.functional.mse_loss(torch.zeros_like(y), y).item()


def zero_head():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model


def zero_adapter():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(16, 1)
            self.down, self.up = nn.Linear(16, 8), nn.Linear(8, 1, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x) + self.up(torch.relu(self.down(x)))

    return Adapter()


@pytest.mark.parametrize("make", [zero_head, zero_adapter])
def test_layers_that_start_at_zero_learn(make):
    config = QuantConfig(
        weight=QuantSpec(bits=8, symmetric=True, granularity=PerChannel()),
        activation=QuantSpec(bits=8, parameterization="min_max"),
    )
    loss, start = jointly_trained(make(), config)
    assert loss < 0.1 * start


@pytest.mark.parametrize("size", [3e-7, 1e-5, 1e5])
def test_a_range_is_that_of_its_data_whatever_their_size(size):
    layer = QuantLinear(8, 4, weight=QuantSpec(4, True, parameterization="min_max"))
    with torch.no_grad():
        layer.weight.mul_(size)
    asymq.calibrate(layer, [torch.randn(2, 8)])
    error = (layer.quantized_weight() - layer.weight).abs().max() / layer.weight.abs().max()
    assert error < 0.1
    quantizer = calibrated(QuantSpec(4, parameterization="min_max"), [-size, 0.0, size])
    assert ends(quantizer) == pytest.approx((-size, size), rel=1e-6)


# ---- what a DataLoader gives ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_with_targets(kind):
    spec = QuantSpec(parameterization="min_max")
    model = nn.Sequential(QuantAct(spec))
    asymq.calibrate(model, [kind((torch.tensor([-1.0, 2.0]), torch.tensor([7.0])))])
    assert ends(model[0]) == (-1, 2)


def test_other_batches_are_refused_with_a_way_out():
    model = nn.Sequential(QuantAct(QuantSpec()))
    for batch in ("text", 3, ()):
        with pytest.raises(ValueError, match=r"got .*; a generator makes .*for batch in batches"):
            asymq.calibrate(model, [batch])


# ---- methods -------------------------------------------------------------------------------------


def spec_of(symmetric=False, bits=4, **options):
    return QuantSpec(bits, symmetric, parameterization="min_max", **options)


def heavy(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) ** 3 + 0.25


def calibrated_by(method, spec, *batches, channels=None, **options):
    quantizer = QuantAct(spec, channels)
    asymq.calibrate(quantizer, batches, method=method, **options)
    return quantizer


@pytest.mark.parametrize("symmetric", [False, True])
def test_percentiles_are_exact_for_few_values(symmetric):
    x = heavy(4, 500)
    quantizer = calibrated_by("percentile", spec_of(symmetric), *x, percentile=97)
    values = (x.abs() if symmetric else x).double().flatten()
    expected = torch.quantile(values, torch.tensor([0.03, 0.97], dtype=torch.float64))
    assert quantizer.max.item() == pytest.approx(expected[1].item(), rel=1e-6)
    if not symmetric:
        assert quantizer.min.item() == pytest.approx(expected[0].item(), rel=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_histograms_are_as_good_as_their_bins(method, symmetric, monkeypatch):
    """Batches of growing width, far from 0 at first, so that bins merge on the way."""
    batches = [1 + 1e-3 * heavy(3, 400), heavy(3, 400, seed=1), 50 * heavy(3, 400, seed=2)]
    spec = spec_of(symmetric, granularity=PerChannel(0))
    ranges = []
    for exact in (2**20, 1000):
        monkeypatch.setattr("asymq.quantizers.observers.EXACT", exact)
        quantizer = calibrated_by(method, spec, *batches, channels=3, percentile=99)
        ranges.append(torch.stack([p.detach() for p in quantizer.parameters()]))
    x = torch.cat(batches, 1)
    width = x.amax(1) - x.amin(1)
    # A bin is at most twice as wide as all of them need; a step of mse is 1 % of the range.
    bound = 2 * width / 8190 if method == "percentile" else 0.011 * width
    assert ((ranges[0] - ranges[1]).abs() <= bound).all()
    assert (ranges[0] != ranges[1]).any() or method == "mse"


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_has_the_least_error_of_its_candidates(symmetric):
    x = heavy(5, 300)
    layer = QuantLinear(300, 5, weight=spec_of(symmetric, granularity=PerChannel()))
    with torch.no_grad():
        layer.weight.copy_(x)
    asymq.calibrate(layer, [torch.randn(2, 300)], weight_method="mse")
    quantizer = layer.weight_quantizer
    least = (quantizer(layer.weight) - x).square().sum(1)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    for a in torch.arange(1, 101) / 100:
        quantizer.set_range(a * low, a * high)
        assert (least <= (quantizer(layer.weight) - x).square().sum(1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("full_range", [False, True])
def test_lsq_symmetric(full_range):
    x = heavy(300)
    spec = QuantSpec(4, True, parameterization="scale_offset", full_range=full_range)
    quantizer = calibrated_by("lsq", spec, x[:100], x[100:])
    assert quantizer.scale.item() == pytest.approx(2 * x.abs().mean().item() / 7**0.5, rel=1e-5)


def test_lsq_asymmetric():
    x = heavy(300)
    quantizer = calibrated_by("lsq", spec_of(), x[:100], x[100:])
    mean, reach = x.mean().item(), 3 * x.std(correction=0).item()
    expected = max(mean - reach, x.min().item()), min(mean + reach, x.max().item())
    assert ends(quantizer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["min_max", "percentile", "mse", "lsq"])
def test_positions_that_do_not_count(method):
    """As if they were not there, in every tensor that has positions."""
    model = gpt2()
    config = QuantConfig(None, spec_of(bits=8), None)
    asymq.prepare(model, config)
    batch = tokens(1, 10)
    asymq.calibrate(model, [batch], method=method)
    alone = {n: ends(q) for n, q in asymq.named_quantizers(model)}
    padded = torch.cat([batch, tokens(1, 3, seed=8)], 1)
    mask = torch.ones_like(padded)
    mask[:, 10:] = 0
    asymq.calibrate(model, [{"input_ids": padded, "attention_mask": mask}], method=method)
    for name, quantizer in asymq.named_quantizers(model):
        assert ends(quantizer) == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


def test_first_tokens_do_not_count():
    x = heavy(2, 6, 3)
    x[:, :2] *= 100
    quantizer = calibrated_by("min_max", spec_of(), x, skip_tokens=2)
    assert ends(quantizer) == (x[:, 2:].min(), x[:, 2:].max())
    with pytest.warns(UserWarning, match="no data reached"):
        calibrated_by("min_max", spec_of(), x, skip_tokens=6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "max"}, "method must be one of min_max, percentile, mse, lsq, got 'max'"),
        ({"weight_method": 3}, "weight_method must be one of"),
        ({"percentile": 50}, r"percentile must lie in \(50, 100\], got 50"),
        ({"percentile": 100.5}, r"percentile must lie in"),
        ({"percentile": "99"}, r"percentile must lie in"),
        ({"skip_tokens": -1}, "skip_tokens must be an integer of at least 0, got -1"),
        ({"skip_tokens": True}, "skip_tokens must be an integer of at least 0, got True"),
    ],
)
def test_options_that_cannot_be(options, message):
    quantizer = QuantAct(spec_of())
    with pytest.raises(ValueError, match=f"asymq.calibrate: {message}"):
        asymq.calibrate(quantizer, [torch.randn(3)], **options)
    assert not quantizer.calibrated
