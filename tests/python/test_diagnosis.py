"""What is seen of quantizers."""

import math

import pytest
import torch
from tiny_models import gpt2, prepared, tokens
from torch import nn

import asymq
from asymq import PerChannel, PerToken, QuantAct, QuantSpec


def ranged(spec, low, high, channels=None):
    quantizer = QuantAct(spec, channels)
    ends = (torch.full(quantizer.range_shape, end) for end in (low, high))
    quantizer.set_range(*ends)
    return quantizer


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", [None, PerChannel()])
def test_numbers_of_one_quantizer(symmetric, granularity):
    options = {} if granularity is None else {"granularity": granularity}
    spec = QuantSpec(2, symmetric, parameterization="min_max", **options)
    quantizer = ranged(spec, -1.0, 2.0, 2)
    x = torch.tensor([[-3.0, 0.0], [0.2, 0.1], [0.3, 4.0], [0.1, 0.9]])
    (row,) = asymq.diagnose(quantizer, x).rows
    error = (x - quantizer(x).detach()).square().sum()
    assert row.sqnr_db == pytest.approx(10 * math.log10(x.square().sum() / error), rel=1e-5)
    assert row.clipped == 2 / 8
    grid = quantizer(x).detach()
    levels = 3 if symmetric else 4
    parts = [grid] if granularity is None else list(grid.t())
    shares = [part.unique().numel() / levels for part in parts]
    assert row.used_levels == pytest.approx(sum(shares) / len(shares))
    assert row.loss_increase is None and row.bits == 2 and row.kind == "activation"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_ranges_of_tokens(group, symmetric):
    quantizer = QuantAct(QuantSpec(8, symmetric, PerToken(group)), 8)
    x = torch.randn(3, 5, 8)
    (row,) = asymq.diagnose(quantizer, x).rows
    assert row.clipped == 0 and 20 < row.sqnr_db < 80
    assert 0 < row.used_levels <= (group or 8) / 255


def test_constant_and_unreached_sites_come_last():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            spec = QuantSpec(parameterization="min_max")
            self.zeros, self.unused = (ranged(spec, -1.0, 1.0) for _ in range(2))
            self.good = ranged(spec, -4.0, 4.0)
            self.bad = ranged(spec.replace(bits=2), -4.0, 4.0)

        def forward(self, x):
            return self.good(x) + self.bad(x) + self.zeros(0 * x)

    model = Model()
    model.good.state = "off"
    diagnosis = asymq.diagnose(model, torch.randn(100))
    assert [row.name for row in diagnosis.rows[:2]] == ["bad", "good"]
    assert all(math.isnan(row.sqnr_db) for row in diagnosis.rows[2:])
    assert [q.state for _, q in asymq.named_quantizers(model)] == ["quantizing"] * 2 + [
        "off",
        "quantizing",
    ]
    assert len(str(diagnosis).splitlines()) == 6


def test_loss_increase():
    model = prepared(gpt2())
    batch = {"input_ids": tokens(), "labels": tokens()}
    rows = asymq.diagnose(model, batch, loss=True).rows
    increases = [row.loss_increase for row in rows if not math.isnan(row.sqnr_db)]
    assert increases == sorted(increases, reverse=True)
    asymq.disable_quantizers(model)
    with torch.no_grad():
        before = model(**batch).loss.item()
        dict(asymq.named_quantizers(model))[rows[0].name].state = "quantizing"
        after = model(**batch).loss.item()
    assert rows[0].loss_increase == pytest.approx(after - before, abs=1e-6)


def test_what_cannot_be_diagnosed():
    with pytest.raises(ValueError, match="no quantizers"):
        asymq.diagnose(nn.Linear(2, 2), torch.randn(2, 2))
    quantizer = QuantAct(QuantSpec())
    with pytest.raises(RuntimeError, match="calibrate"):
        asymq.diagnose(quantizer, torch.randn(2))
    quantizer = ranged(QuantSpec(), -1.0, 1.0)
    with pytest.raises(ValueError, match="needs labels"):
        asymq.diagnose(quantizer, torch.randn(2), loss=True)
    assert quantizer.state == "quantizing"


# ---- ranges while they learn ---------------------------------------------------------------------


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value


def test_what_is_logged():
    model = nn.Sequential(
        ranged(QuantSpec(8, parameterization="min_max"), -1.0, 2.0),
        QuantAct(QuantSpec(dynamic=True)),
        QuantAct(QuantSpec()),  # not set
    )
    model[2].state = "off"
    entries, writer = [], Writer()
    loggers = [
        asymq.RangeLogger(model, log, every=2)
        for log in (lambda numbers, n: entries.append((numbers, n)), writer)
    ]
    model(torch.linspace(-3, 3, 50)).square().sum().backward()
    for n in range(3):
        for logger in loggers:
            logger.step(n)
    assert [n for _, n in entries] == [0, 2]
    numbers = entries[0][0]
    low, high = model[0].bounds()
    assert numbers["range/0/low"] == low.item() and numbers["range/0/high"] == high.item()
    assert numbers["range/1/beta"] == 1 and numbers["collapsed/activation"] == 0
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    expected = torch.stack(squares).sum().sqrt().item()
    assert numbers["range_gradient/activation"] == pytest.approx(expected, rel=1e-5)
    assert not any("/2/" in name for name in numbers)
    assert writer.scalars == {(k, n): v for numbers, n in entries for k, v in numbers.items()}


def test_what_cannot_be_logged():
    quantizer = ranged(QuantSpec(), -1.0, 1.0)
    with pytest.raises(ValueError, match="no quantizers"):
        asymq.RangeLogger(nn.Linear(2, 2), print)
    for every in (0, 1.5, float("nan"), True):
        with pytest.raises(
            ValueError, match=f"every must be an integer of at least 1, got {every}"
        ):
            asymq.RangeLogger(quantizer, print, every=every)
    with pytest.raises(TypeError, match="log must have add_scalar or be callable, got int"):
        asymq.RangeLogger(quantizer, 3)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    model = nn.Sequential(ranged(QuantSpec(), -1.0, 2.0), QuantAct(QuantSpec(dynamic=True)))
    before = model[0].bounds()
    with torch.no_grad():
        model[0].gamma.mul_(2)
    assert [end.item() for end in model[0].bounds(initial=True)] == [end.item() for end in before]
    assert model[0].bounds()[1] > 1.9 * before[1]
    asymq.plot_ranges(model, tmp_path / "ranges.svg")
    assert "<svg" in (tmp_path / "ranges.svg").read_text()
    with pytest.raises(RuntimeError, match="no stored range that is set"):
        asymq.plot_ranges(model[1], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
