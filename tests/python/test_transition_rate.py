"""The scheduler of transition rates: the golden trajectories, optimizers, states, hooks, processes."""

import copy
import functools
import io
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from processes import run
from torch import distributed as dist
from torch import nn

import asymq
from asymq import PerChannel, PerGroup, QuantLinear, QuantSpec
from asymq.quantizers import named_quantizers

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "transition_rate.json").read_text())
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "weight_decay": 1e-2},
    "Adam": {},
    "AdamW": {"weight_decay": 0.1},
}
VALUES = ("transition_rate", "target_rate", "running_rate", "learning_rate")


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def linear(weight, bits, scale):
    """A linear layer on a grid of its own, -2..1 or -4..3."""
    spec = QuantSpec(bits=bits, parameterization="scale_offset")
    rows, columns = len(weight), len(weight[0])
    layer = QuantLinear(columns, rows, False, None, torch.float64, weight=spec)
    with torch.no_grad():
        layer.weight.copy_(double(weight))
        layer.weight_quantizer.scale.fill_(scale)
        layer.weight_quantizer.offset.fill_(-(2.0 ** (bits - 1)))
    layer.weight_quantizer.calibrated = True
    return layer


class Case:
    """A model, an optimizer and a scheduler of one golden trajectory."""

    def __init__(self, golden, device="cpu", fast=False, **options):
        self.golden = golden
        layers = zip(golden["weights"], golden["bits"], golden["scales"], strict=True)
        self.model = nn.Sequential(*(linear(*layer) for layer in layers)).to(device)
        asymq.freeze_weight_ranges(self.model)
        self.x, self.t = (double(golden[name]).to(device) for name in ("X", "T"))
        keywords = OPTIMIZERS[golden["optimizer"]] | options
        cls = getattr(torch.optim, golden["optimizer"])
        self.optimizer = cls(self.model.parameters(), lr=golden["lr"], **keywords)
        names = ("factor", "momentum", "rule", "gain", "schedule", "shared")
        self.rates = asymq.TransitionRateScheduler(
            self.optimizer,
            self.model,
            golden["total_steps"],
            limit=None,
            **{name: golden[name] for name in names},
        )

    def backward(self):
        self.optimizer.zero_grad()
        loss = 0.5 * (self.model(self.x) - self.t).square().sum() / len(self.x)
        loss.backward()
        return loss.detach()

    def step(self):
        loss = self.backward()
        self.optimizer.step()
        self.rates.step()
        return loss

    def values(self):
        return {name: getattr(self.rates, name) for name in VALUES}

    def state(self):
        parts = (self.model, self.optimizer, self.rates)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file):
        parts = (self.model, self.optimizer, self.rates)
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)


def assert_trajectory(case, tolerance=1e-9):
    for expected in case.golden["trace"]:
        loss = case.step()
        torch.testing.assert_close(loss.cpu(), double(expected["loss"]), rtol=tolerance, atol=0)
        for name, key in zip(VALUES, "kRKU", strict=True):
            actual = case.values()[name].cpu()
            wanted = double(expected[key]).reshape(-1)
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
        for layer, codes in zip(case.model, expected["codes"], strict=True):
            scale_offset = layer.weight_quantizer.scale_offset()
            bits = layer.weight_quantizer.spec.bits
            assert asymq.quantize(layer.weight, *scale_offset, bits=bits).tolist() == codes
    for layer, expected in zip(case.model, case.golden["final"], strict=True):
        weight = layer.weight.detach().cpu()
        torch.testing.assert_close(weight, double(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g['optimizer']}-{g['rule']}")
def test_golden_trajectory(golden, device):
    assert_trajectory(Case(golden, device))


def test_golden_covers_what_it_says():
    assert {g["optimizer"] for g in GOLDEN} == set(OPTIMIZERS)
    assert {g["rule"] for g in GOLDEN} == {"additive", "multiplicative"}
    assert any(g["shared"] for g in GOLDEN)
    first = GOLDEN[0]["trace"]
    assert [step["counts"] for step in first[:3]] == [[3, 2], [1, 4], [1, 4]]
