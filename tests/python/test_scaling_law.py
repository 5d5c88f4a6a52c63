"""The scaling law of quantization-aware training: its functions, its fits, and its quantizers."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from scipy.special import huber
from torch.nn import functional

import asymq
from asymq.config import PRECISIONS
from asymq.scaling_law import (
    HUBER,
    PAPER_CHINCHILLA,
    PAPER_LAWS,
    Chinchilla,
    bootstrap,
    effective_parameters,
    fit_chinchilla,
    fit_law,
)

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "scaling_law.json").read_text())
LAW = PAPER_LAWS["W4A4"]
GROUPS = (16, 32, 0)  # 0: per token
WIDTHS = {0.21e6: 64, 0.85e6: 128, 3.4e6: 256, 11.5e6: 384}
CELLS = [
    (n, d, g or width)
    for (n, width), d, g in itertools.product(WIDTHS.items(), (15e6, 30e6, 60e6), GROUPS)
]


# ---- laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["delta"], ids=lambda c: f"{c['law']}-{c['G']:.0f}")
def test_golden_values(case):
    delta = PAPER_LAWS[case["law"]].delta(case["N"], case["D"], case["G"])
    assert delta == pytest.approx(case["delta"], rel=1e-9)
    loss = PAPER_CHINCHILLA.loss(case["N"], case["D"]) + delta
    assert loss == pytest.approx(case["loss"], rel=1e-9)
    share = effective_parameters(case["N"], delta, PAPER_CHINCHILLA)
    assert share == pytest.approx(case["epm"], rel=1e-9)


def test_values_by_hand():
    n, d = 594e6, 100e9
    deltas = LAW.delta(n, d, np.array([32, 128, 256, 1536]))
    assert deltas.round(4).tolist() == [0.0441, 0.0573, 0.0636, 0.0790]
    assert PAPER_CHINCHILLA.loss(n, d).round(4) == 2.7409
    assert effective_parameters(n, deltas[1], PAPER_CHINCHILLA).round(3) == 0.712
    better = PAPER_LAWS["W4A4-FC2A8"].delta(n, d, 128)
    assert effective_parameters(n, better, PAPER_CHINCHILLA).round(3) == 0.795


def test_numbers_and_arrays():
    assert LAW.delta(1e6, 1e7, 32).dtype == np.float64
    assert LAW.delta([1e6, 2e6], [[1e7], [2e7], [3e7]], 32).shape == (3, 2)
    assert PAPER_CHINCHILLA.loss([1e6, 2e6], 1e7).shape == (2,)


@pytest.mark.parametrize(
    "given, name",
    [
        ((0, 1e7, 32), "params"),
        (([1e6, -1], 1e7, 32), "params"),
        ((1e6, [1e7, 0], 32), "tokens"),
        ((1e6, float("inf"), 32), "tokens"),
        ((1e6, 1e7, [32, 1]), "group"),
        ((1e6, 1e7, float("nan")), "group"),
    ],
)
def test_what_laws_refuse(given, name):
    with pytest.raises(ValueError, match=f"{name} must be above"):
        LAW.delta(*given)
    if name != "group":
        with pytest.raises(ValueError, match=f"{name} must be above"):
            PAPER_CHINCHILLA.loss(*given[:2])


def test_a_loss_that_no_size_has():
    with pytest.raises(ValueError, match="delta must be above"):
        effective_parameters(1e6, [0.1, -10], PAPER_CHINCHILLA)


# ---- fits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["fit"], ids=["exact", "noisy"])
def test_golden_fits(case):
    data = case["N"], case["D"], case["G"]
    fit = fit_law(*data, case["delta"])
    expected = case["result"]
    residuals = np.log(fit.law.delta(*data)) - np.log(case["delta"])
    assert huber(HUBER, residuals).sum() <= 1.001 * expected["objective"] + 1e-20
    assert (fit.runs, fit.dropped) == (expected["runs"], expected["dropped"])
    assert fit.error == pytest.approx(expected["error"], rel=1e-3, abs=1e-12)
    for name in ("k", "gamma_N", "gamma_D", "gamma_G"):
        assert getattr(fit.law, name) == pytest.approx(expected[name], rel=1e-4)


def _noisy(random, noise):
    """δ of all cells; those of one size and number of tokens share a baseline."""
    n, d, g = np.array(CELLS).T
    baselines = np.repeat(random.normal(size=len(n) // len(GROUPS)), len(GROUPS))
    return n, d, g, LAW.delta(n, d, g) + noise * (random.normal(size=len(n)) - baselines)


def test_a_fit_recovers_the_law():
    random = np.random.default_rng(0)
    fits = [fit_law(*_noisy(random, 0.002)) for _ in range(100)]
    found = np.array([[f.law.gamma_N, f.law.gamma_D, f.law.gamma_G, f.error] for f in fits])
    truth = np.array([LAW.gamma_N, LAW.gamma_D, LAW.gamma_G])
    spread = found.std(0)
    assert (abs(found.mean(0)[:3] - truth) < 4 * spread[:3] / np.sqrt(len(fits))).all()
    assert spread[:3] == pytest.approx([0.005, 0.012, 0.022], rel=0.35)
    assert found[:, 3].mean() == pytest.approx(0.023, rel=0.15)


def test_what_is_not_positive_is_dropped_and_counted():
    n, d, g = np.array(CELLS).T
    delta = LAW.delta(n, d, g)
    delta[::7] *= -1
    delta[1] = 0
    fit = fit_law(n, d, g, delta)
    assert (fit.runs, fit.dropped) == (len(n) - 7, 7)
    assert fit.law.gamma_D == pytest.approx(LAW.gamma_D)


def test_a_law_without_a_column():
    n, d, g = np.array(CELLS).T
    flat = fit_law(n, None, g, LAW.delta(n, 3e7, g)).law
    assert flat.gamma_D == 0
    assert flat.gamma_N == pytest.approx(LAW.gamma_N)
    assert flat.delta(1e6, 1e9, 16) == pytest.approx(LAW.delta(1e6, 3e7, 16))
    one = fit_law(n, d, None, LAW.delta(n, d, 32)).law
    assert one.gamma_G == 0
    assert one.delta(1e6, 1e7, 64) == pytest.approx(LAW.delta(1e6, 1e7, 32))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"n": 1e6}, "params takes one value alone"),
        ({"d": 1e6}, "tokens takes one value alone"),
        ({"g": 32}, "group takes one value alone"),
        ({"delta": -1.0}, "params takes one value alone"),
        ({"delta": np.nan}, "delta must be finite"),
    ],
)
def test_too_little_variation(changed, message):
    n, d, g = np.array(CELLS).T
    given = {"n": n, "d": d, "g": g, "delta": LAW.delta(n, d, g)}
    given |= {name: np.full_like(n, value) for name, value in changed.items()}
    with pytest.raises(ValueError, match=message):
        fit_law(*given.values())


def test_tokens_in_proportion_to_parameters_say_nothing():
    n = np.array([1e6, 1e6, 2e6, 4e6])
    with pytest.raises(ValueError, match="follow from each other"):
        fit_law(n, 20 * n, [16, 32, 16, 16], [0.1, 0.2, 0.1, 0.05])
    with pytest.raises(ValueError, match="follow from each other"):
        fit_chinchilla(n, 20 * n, [4, 4, 3, 2.5])


@pytest.mark.parametrize("tied", [True, False])
def test_chinchilla_recovers_its_constants(tied):
    truth = PAPER_CHINCHILLA if tied else Chinchilla(300.0, 0.31, 900.0, 0.35, 1.7)
    n, d, _ = np.array(CELLS[:: len(GROUPS)]).T
    loss = truth.loss(n, d)
    fit = fit_chinchilla(n, d, loss, tied=tied)
    assert vars(fit) == pytest.approx(vars(truth), rel=1e-3)
    assert vars(fit_chinchilla(n, d, loss, tied=tied, start=fit)) == pytest.approx(
        vars(truth), rel=1e-3
    )


def test_intervals_are_of_cells():
    cells = [i // 3 for i in range(36)]
    values = np.repeat(np.random.default_rng(1).normal(size=12), 3)
    low, high = bootstrap(cells, lambda runs: {"mean": values[runs].mean()}, resamples=2000)["mean"]
    # Twelve independent values, not 36.
    expected = 2 * 1.96 * values.std() / np.sqrt(12)
    assert low < values.mean() < high
    assert high - low == pytest.approx(expected, rel=0.1)


def test_a_law_s_intervals_hold_it():
    n, d, g, delta = _noisy(np.random.default_rng(2), 0.002)

    def statistics(runs):
        return vars(fit_law(n[runs], d[runs], g[runs], delta[runs]).law)

    found = bootstrap([(a, b) for a, b in zip(n, d, strict=True)], statistics)
    for name in ("gamma_N", "gamma_D", "gamma_G"):
        low, high = found[name]
        assert low < getattr(LAW, name) < high
        assert 0.005 < high - low < 0.15


def test_resamples_that_never_vary():
    def refuse(_):
        raise ValueError

    with pytest.raises(ValueError, match="too few cells"):
        bootstrap([1, 2], refuse)


def _printed(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def test_importing_asymq_does_not_import_scipy():
    code = "import sys, asymq; print('asymq.scaling_law' in sys.modules)"
    assert _printed(code) == "False\n"
    assert asymq.scaling_law.PAPER_LAWS is PAPER_LAWS
    # By itself: libraries that asymq imports may want scipy.
    file = asymq.scaling_law.__file__
    code = f"import runpy, sys; runpy.run_path({file!r}); print('scipy' in sys.modules)"
    assert _printed(code) == "False\n"


# ---- quantizers --------------------------------------------------------------------------------


def test_precisions_are_those_of_the_laws():
    assert list(PRECISIONS) == list(PAPER_LAWS)


def _absmax(x, group, bits):
    """By its definition, of the last axis in groups: codes from -2^(bits - 1) times the scale."""
    parts = x.reshape(*x.shape[:-1], -1, group)
    scale = parts.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    codes = (parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).reshape(x.shape)


def _products(model, monkeypatch):
    """(layer's name, what it was given, what it multiplies) of a forward's linear layers."""
    found, current = [], []
    multiply = functional.linear

    def linear(x, weight, bias=None):
        found.append((*current.pop(), (x.detach(), weight.detach())))
        return multiply(x, weight, bias)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(module, inputs, name=name):
                current.append((name, (inputs[0].detach(), module.weight.detach())))

            module.register_forward_pre_hook(note)
    monkeypatch.setattr(functional, "linear", linear)
    model(input_ids=tiny_models.tokens())
    return found


@pytest.mark.parametrize("precision", PAPER_LAWS)
@pytest.mark.parametrize("group", [16, "token"])
def test_linear_layers_multiply_absmax_codes(precision, group, monkeypatch):
    model = tiny_models.DECODERS["llama"]()
    asymq.prepare(model, asymq.QuantConfig.scaling_law(precision, group))
    weight_bits, input_bits, last_bits = PRECISIONS[precision]
    products = _products(model, monkeypatch)
    assert len(products) == 2 * 7 + 1
    for name, given, multiplied in products:
        own = last_bits if name.endswith("down_proj") else input_bits
        size = given[0].shape[-1] if group == "token" else group
        for exact, actual, bits in zip(given, multiplied, (own, weight_bits), strict=True):
            whole = bits == 0 or name == "lm_head"
            expected = exact if whole else _absmax(exact, size, bits)
            assert torch.equal(actual, expected), name


def test_one_clip_for_all_tokens():
    model = tiny_models.DECODERS["llama"]()
    asymq.prepare(model, asymq.QuantConfig.scaling_law("W16A4", "token"))
    # q, k and v share a quantizer, and gate and up.
    (group,) = asymq.range_parameters(model)
    assert [parameter.tolist() for parameter in group["params"]] == [[1.0]] * 2 * 4


def test_groups_of_256_and_more_learn_a_clip():
    for group, learns in ((16, False), (255, False), (256, True), ("token", True)):
        spec = asymq.QuantConfig.scaling_law("W4A4", group).input
        assert spec.learn == learns and spec.full_range and spec.bits == 4
    config = asymq.QuantConfig.scaling_law("W4A4-FC2A8", 16)
    spec = config.spec_of("model.layers.0.mlp.down_proj.input_quantizer", "input")
    assert spec == config.input.replace(bits=8)


@pytest.mark.parametrize(
    "given, message",
    [
        (("W8A8", 32), "precision must be one of W4A4, W4A16"),
        (("W4A4", "row"), "group must be"),
        (("W4A4", 1), "group must be"),
        (("W4A4", True), "group must be"),
        (("W4A4", 2.0), "group must be"),
    ],
)
def test_what_the_recipe_refuses(given, message):
    with pytest.raises(ValueError, match=f"QuantConfig.scaling_law: {message}"):
        asymq.QuantConfig.scaling_law(*given)


@pytest.mark.parametrize("case", GOLDEN["quantizer"], ids=["AbsMax", "LAC"])
def test_golden_quantizers(case, device):
    """Codes, values and gradients of inputs, and of weights, whose operator is another one."""
    options = {"dtype": torch.float64, "device": device}
    x = torch.tensor(case["x"], **options).requires_grad_()
    upstream, expected = (torch.tensor(case[key], **options) for key in ("upstream", "xhat"))
    groups, clip = x.shape[-1] // case["group"], case["clip"]
    factors = torch.tensor(clip or [1.0] * groups, **options).requires_grad_()
    of_input = asymq.fake_quantize_dynamic_symmetric_gamma(
        x, factors, bits=case["bits"], group=case["group"], full_range=True
    )
    results = [(of_input, 1e-12)]
    if clip is None:
        spec = asymq.QuantConfig.scaling_law("W4A4", case["group"]).weight
        layer = asymq.QuantLinear(x.shape[1], x.shape[0], weight=spec, dtype=x.dtype, device=device)
        results.append((layer.weight_quantizer(x), 1e-7))  # its ranges are float32
    for result, tolerance in results:
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=0)
        grad, grad_clip = torch.autograd.grad(
            result, (x, factors), upstream, allow_unused=True, retain_graph=True
        )
        torch.testing.assert_close(grad, torch.tensor(case["grad_x"], **options), rtol=0, atol=0)
        if clip is not None:
            torch.testing.assert_close(
                grad_clip, torch.tensor(case["grad_clip"], **options), rtol=1e-9, atol=0
            )
