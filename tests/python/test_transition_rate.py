"""The scheduler of transition rates: golden trajectories, optimizers, states, hooks, processes."""

import copy
import functools
import io
import json
import math
from pathlib import Path

import pytest
import torch
from processes import run
from tiny_models import gpt2, next_token_loss, prepared, tokens, transformers
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import asymq
from asymq import PerChannel, PerGroup, QuantConfig, QuantLinear, QuantSpec
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

    def everything(self):
        """What must be bit-equal where two runs are one."""
        weights = [layer.weight.detach().clone() for layer in self.model]
        return [*self.values().values(), *weights]

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


def test_ranges_set_between_steps_count_from_then_on(device):
    case = Case(GOLDEN[0], device)
    case.step()
    layer = case.model[0]
    scale, offset = layer.weight_quantizer.scale_offset()
    bits = layer.weight_quantizer.spec.bits
    before = asymq.quantize(layer.weight, scale, offset, bits=bits)
    with torch.no_grad():
        layer.weight_quantizer.scale.mul_(3)
    case.step()
    after = asymq.quantize(layer.weight, 3 * scale, offset, bits=bits)
    expected = (before != after).double().mean().cpu()
    assert expected > 0 and case.rates.transition_rate[0].cpu() == expected


def assert_same(one, other):
    for a, b in zip(one.everything(), other.everything(), strict=True):
        assert torch.equal(a, b)


def layer_of(spec, rows=8, columns=16):
    layer = QuantLinear(columns, rows, weight=spec)
    asymq.calibrate(layer, [torch.randn(2, columns)])
    return layer


def network(spec=None, learn=False):
    """Two quantized layers, a float one between them."""
    spec = QuantSpec(bits=3, granularity=PerChannel(), learn=learn) if spec is None else spec
    model = nn.Sequential(layer_of(spec), nn.LayerNorm(8), nn.Linear(8, 16), layer_of(spec))
    return model


def backward(model, optimizer):
    optimizer.zero_grad()
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    model(x.to(next(model.parameters()))).square().mean().backward()


def optimizer_step(model, optimizer):
    backward(model, optimizer)
    optimizer.step()


# ---- groups ------------------------------------------------------------------------------------


def test_every_weight_gets_a_group_of_its_own():
    model = network()
    parameters = list(model.named_parameters())
    groups = [
        {"params": [p for p in parameters[:5]], "weight_decay": 0.5},
        {"params": [p for p in parameters[5:]], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    before = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    rates = asymq.TransitionRateScheduler(optimizer, model, 10)
    assert rates.names == ["0.weight", "3.weight"]
    groups = optimizer.param_groups
    assert [n for group in groups for n in group["param_names"]] == [n for n, _ in parameters]
    assert [id(p) for g in groups for p in g["params"]] == [id(p) for _, p in parameters]
    for group in groups:
        assert len(group["params"]) == len(group["param_names"]) > 0
        assert group["momentum"] == 0.9
        for name in group["param_names"]:
            lr, decay = before[name]
            assert group["weight_decay"] == decay
            if name not in rates.names:
                assert group["lr"] == lr and isinstance(group["lr"], float)
                continue
            assert group["param_names"] == [name]
            assert group["lr"].shape == () and group["lr"].dtype == torch.float32
            assert group["lr"] == pytest.approx(lr)
    tensors = [group["lr"] for group in groups]
    for _ in range(3):
        optimizer_step(model, optimizer)
        rates.step()
    assert all(group["lr"] is lr for group, lr in zip(groups, tensors, strict=True))
    lrs = [group["lr"] for group in groups if group["param_names"][0] in rates.names]
    torch.testing.assert_close(torch.stack(lrs), rates.learning_rate.float(), rtol=0, atol=0)
    assert (rates.learning_rate != double([0.1, 0.2])).all()


def test_the_rate_has_the_precision_of_the_weights():
    for wide, fused, dtype in (
        (True, None, torch.float64),
        (True, True, torch.float32),
        (False, None, torch.float32),
    ):
        model = network().double() if wide else network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        rates = asymq.TransitionRateScheduler(optimizer, model, 10)
        scheduled = [g for g in optimizer.param_groups if torch.is_tensor(g["lr"])]
        assert [g["lr"].dtype for g in scheduled] == [dtype] * len(rates.names)


def test_what_is_scheduled():
    """Weights with a weight quantizer, a tied one once, that require grad and are optimized."""
    model = prepared(gpt2(), "min_max")
    asymq.freeze_weight_ranges(model)
    frozen = model.transformer.h[0].mlp.c_fc.weight
    frozen.requires_grad_(False)
    left_out = model.transformer.h[1].mlp.c_fc.weight
    kept = [p for p in model.parameters() if p is not left_out]
    rates = asymq.TransitionRateScheduler(torch.optim.AdamW(kept, lr=1e-3), model, 10)
    expected = [
        name
        for name, p in model.named_parameters()
        if name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight"))
    ]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert rates.names == expected and len(expected) == 8


@pytest.mark.parametrize("shared", [False, True])
def test_rates_follow_their_definition(shared):
    """In plain float64 arithmetic, from codes that quantize gives before and after each step."""
    model = network()
    quantizers = [model[i].weight_quantizer for i in (0, 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rates = asymq.TransitionRateScheduler(
        optimizer,
        model,
        20,
        factor=0.01,
        gain=3,
        rule="additive",
        shared=shared,
        schedule="linear",
        limit=1.2,
    )

    def codes():
        layers = (model[0], model[3])
        return [
            asymq.quantize(layer.weight, *q.scale_offset(), bits=3).int()
            for layer, q in zip(layers, quantizers, strict=True)
        ]

    n = 1 if shared else 2
    sizes = [128, 128] if not shared else [256]
    running, lrs = [0.01 * math.sqrt(3)] * n, [0.5] * n
    for t in range(1, 26):
        before = codes()
        optimizer_step(model, optimizer)
        counts = [int((a != b).sum()) for a, b in zip(before, codes(), strict=True)]
        counts = [sum(counts)] if shared else counts
        rates.step()
        target = 0.01 * math.sqrt(3) * (1 - min(t / 20, 1))
        for i in range(n):
            running[i] = rates._momentum * running[i] + (1 - rates._momentum) * counts[i] / sizes[i]
            lrs[i] = max(0, lrs[i] + 3 * 0.5 * (target - running[i]))
            lrs[i] = min(lrs[i], 1.2 * 0.5)
        assert rates.transition_rate.tolist() == [c / s for c, s in zip(counts, sizes, strict=True)]
        for actual, expected in (
            (rates.running_rate, running),
            (rates.target_rate, [target] * n),
            (rates.learning_rate, lrs),
        ):
            assert actual.dtype == torch.float64 and actual.shape == (n,)
            torch.testing.assert_close(actual, double(expected), rtol=1e-12, atol=1e-12)


def test_momentum_is_that_of_the_run():
    for total, momentum in ((1, 0.5), (100, 0.5), (500, 0.9), (10**6, 0.99)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rates = asymq.TransitionRateScheduler(optimizer, model, total)
        assert rates._momentum == pytest.approx(momentum)


def test_a_schedule_is_any_function():
    golden = GOLDEN[0] | {"schedule": lambda x: (1 + torch.cos(math.pi * x)) / 2}
    assert_trajectory(Case(golden))
    for schedule, at_end in (("constant", 1), ("linear", 0), ("cosine", 0)):
        case = Case(GOLDEN[0] | {"schedule": schedule, "total_steps": 3})
        for _ in range(5):
            case.step()
        targets = at_end * 0.02 * double([2.0, 3.0]).sqrt()
        torch.testing.assert_close(case.rates.target_rate, targets, rtol=1e-12, atol=1e-12)


def test_the_running_rate_follows_the_target():
    torch.manual_seed(3)
    spec = QuantSpec(bits=2, granularity=PerChannel(), learn=False)
    model = nn.Sequential(
        QuantLinear(16, 64, weight=spec), nn.ReLU(), QuantLinear(64, 16, weight=spec)
    )
    x = torch.randn(512, 16)
    target = torch.tanh(x @ torch.randn(16, 16))
    asymq.calibrate(model, [x])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rates = asymq.TransitionRateScheduler(optimizer, model, 600)
    distances = []
    for _ in range(600):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        (model(x[batch]) - target[batch]).square().mean().backward()
        optimizer.step()
        rates.step()
        distances.append((rates.running_rate - rates.target_rate).abs())
    middle = torch.stack(distances[150:450]).mean(0)
    assert (middle < 0.5 * 5e-3 * math.sqrt(2)).all()


def test_limit():
    """Where no code can flip, the multiplicative rule would let the rate grow without bound."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    rates = asymq.TransitionRateScheduler(optimizer, model, 40, schedule="constant")
    for _ in range(40):
        optimizer_step(model, optimizer)
        rates.step()
    torch.testing.assert_close(rates.learning_rate, double([1e-11, 1e-11]), rtol=1e-12, atol=0)


OTHERS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop"]
OTHERS += ["ASGD", "Rprop", "Adafactor", "Muon"]


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers(name):
    """A rate in a tensor, or in a float, is the same rate."""
    model = network()
    weights = [p for p in model.parameters() if p.dim() == 2 and p.requires_grad]
    optimizer = getattr(torch.optim, name)(weights, lr=0.05)
    rates = asymq.TransitionRateScheduler(optimizer, model, 10, factor=0.05)
    twin = copy.deepcopy(model)
    plain = [p for p in twin.parameters() if p.dim() == 2 and p.requires_grad]
    scheduled = [i for i, g in enumerate(optimizer.param_groups) if torch.is_tensor(g["lr"])]
    assert scheduled == [0, 2]
    by_hand = getattr(torch.optim, name)([{"params": [p]} for p in plain], lr=0.05)
    for _ in range(4):
        for i, lr in zip(scheduled, rates.learning_rate.float().tolist(), strict=True):
            by_hand.param_groups[i]["lr"] = lr
        optimizer_step(model, optimizer)
        optimizer_step(twin, by_hand)
        rates.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (rates.learning_rate != 0.05).all()


class Foreign(torch.optim.Optimizer):
    """One that knows floats alone."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert isinstance(group["lr"], float)
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


def test_an_optimizer_that_takes_floats():
    runs = []
    for cls in (Foreign, torch.optim.SGD):
        torch.manual_seed(0)
        model = network().double()
        optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=0.5)
        rates = asymq.TransitionRateScheduler(optimizer, model, 10)
        for _ in range(5):
            optimizer_step(model, optimizer)
            rates.step()
        runs.append(rates.learning_rate)
        assert [
            float(g["lr"]) for g in (optimizer.param_groups[0], optimizer.param_groups[-2])
        ] == (rates.learning_rate.tolist())
    assert torch.equal(*runs) and (runs[0] != 0.5).all()


# ---- what counts -------------------------------------------------------------------------------


def test_only_optimizer_steps_count():
    case, twin = Case(GOLDEN[1]), Case(GOLDEN[1])
    for _ in range(5):
        case.rates.step()  # nothing since the last step
        case.model.eval()
        with torch.no_grad():
            case.model(case.x)
        case.model.train()
        case.optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 16)):  # accumulates
            loss = 0.5 * (case.model(case.x[part]) - case.t[part]).square().sum() / len(case.x)
            loss.backward()
        case.optimizer.step()
        case.rates.step()
        case.rates.step()
        twin.step()
        for a, b in zip(case.everything(), twin.everything(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_weights_may_be_loaded_after_it_is_made():
    case, twin = Case(GOLDEN[0]), Case(GOLDEN[0])
    state = copy.deepcopy(case.model.state_dict())
    with torch.no_grad():
        for layer in case.model:
            layer.weight.neg_()
    case.model.load_state_dict(state)
    for one in (case, twin):
        one.step()
    assert_same(case, twin)


def test_values_are_of_their_time():
    case = Case(GOLDEN[0])
    kept = [case.rates.learning_rate]
    for _ in range(3):
        case.step()
        kept.append(case.rates.learning_rate)
    expected = [[0.05, 0.05], *(step["U"] for step in GOLDEN[0]["trace"][:3])]
    torch.testing.assert_close(torch.stack(kept), double(expected), rtol=1e-12, atol=0)


# ---- states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g['optimizer']}-{g['rule']}")
def test_resuming_after_any_step_is_bit_equal(golden):
    whole, states = Case(golden), []
    for _ in range(golden["total_steps"]):
        states.append(whole.state())
        whole.step()
    for done, state in enumerate(states):
        again = Case(golden)
        if done % 2:  # neither its own past nor another rate matters
            again = Case(golden | {"lr": 0.7})
            again.step()
        again.load(state)
        for _ in range(golden["total_steps"] - done):
            again.step()
        assert_same(again, whole)


def test_a_state_of_other_weights():
    case = Case(GOLDEN[0])
    state = case.rates.state_dict()
    other = network()
    rates = asymq.TransitionRateScheduler(torch.optim.SGD(other.parameters()), other, 9)
    with pytest.raises(ValueError, match=r"asymq\.TransitionRateScheduler: the state is of other"):
        rates.load_state_dict(state)
    with pytest.raises(ValueError, match="other weights"):
        Case(GOLDEN[0] | {"shared": True}).rates.load_state_dict(state)
    state["running_rate"].zero_()  # it is no view of the scheduler's own
    assert (case.rates.running_rate > 0).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_functions_of_distributed_checkpoint(optimizer):
    """They call optimizer.step() of an optimizer without a state, with a rate of 0."""
    golden = next(g for g in GOLDEN if g["optimizer"] == optimizer)
    case, twin = Case(golden), Case(golden)
    before = case.everything()
    state = get_optimizer_state_dict(case.model, case.optimizer)
    for a, b in zip(before, case.everything(), strict=True):
        assert torch.equal(a, b)
    case.rates.step()
    assert case.rates.state_dict()["step"] == 0
    # The weights come after it.
    with torch.no_grad():
        for layer in case.model:
            layer.weight.neg_()
    set_optimizer_state_dict(case.model, case.optimizer, state)
    with torch.no_grad():
        for layer in case.model:
            layer.weight.neg_()
    case.optimizer.state.clear()
    for _ in range(4):
        case.step()
        twin.step()
    assert_same(case, twin)
    # And of one that has stepped.
    state = copy.deepcopy(get_optimizer_state_dict(case.model, case.optimizer))
    again = Case(golden)
    again.model.load_state_dict(case.model.state_dict())
    set_optimizer_state_dict(again.model, again.optimizer, state)
    again.rates.load_state_dict(case.rates.state_dict())
    for _ in range(4):
        case.step()
        again.step()
    assert_same(case, again)


def test_a_warm_up_from_zero_is_no_probe():
    """An LR scheduler that starts at 0 writes what the state functions write."""
    for cls in (Foreign, torch.optim.SGD):
        model = network()
        optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=0.5)
        rates = asymq.TransitionRateScheduler(optimizer, model, 10)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)
        optimizer_step(model, optimizer)
        rates.step()
        assert rates.state_dict()["step"] == 1 and (rates.transition_rate > 0).all()


# ---- LR schedulers and scalers -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g['optimizer']}-{g['rule']}")
def test_lr_schedulers_have_the_other_parameters(golden):
    case, plain = Case(golden), Case(golden)
    extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    case.optimizer.add_param_group({"params": [extra]})
    schedule = torch.optim.lr_scheduler.LambdaLR(case.optimizer, lambda step: 1 / (1 + step))
    for step in range(5):
        case.backward()
        schedule.step()
        schedule.step()
        case.optimizer.step()
        case.rates.step()
        plain.step()
        lr = case.optimizer.param_groups[-1]["lr"]
        assert lr == pytest.approx(golden["lr"] / (3 + 2 * step))
    assert_same(case, plain)


def unskipped(case, steps=4):
    for _ in range(steps):
        case.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_a_scaler_skips_changes_nothing(optimizer, fused, device):
    golden = next(g for g in GOLDEN if g["optimizer"] == optimizer)
    case, twin = Case(golden, device, fused=fused), Case(golden, device, fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0)
    for step in range(6):
        case.optimizer.zero_grad()
        loss = 0.5 * (case.model(case.x) - case.t).square().sum() / len(case.x)
        scaler.scale(loss).backward()
        skipped = step in (1, 3)  # not the first: torch's fused SGD has no momentum then
        if skipped:
            case.model[0].weight.grad[0, 0] = math.inf
        before = case.everything()
        scaler.step(case.optimizer)
        case.rates.step()
        scaler.update()
        if skipped:
            for a, b in zip(before, case.everything(), strict=True):
                assert torch.equal(a, b)
        else:
            twin.step()
            for a, b in zip(case.everything(), twin.everything(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert case.rates.state_dict()["step"] == 4


# ---- ranges ------------------------------------------------------------------------------------


def test_freeze_weight_ranges():
    model = prepared(gpt2(), "min_max")
    asymq.freeze_weight_ranges(model)
    for _, quantizer in named_quantizers(model):
        learns = any(p.requires_grad for p in quantizer.parameters())
        assert learns == (quantizer.kind != "weight")
    with pytest.raises(ValueError, match=r"asymq\.freeze_weight_ranges: the model has no"):
        asymq.freeze_weight_ranges(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=3, granularity=PerChannel()),
        QuantSpec(bits=3, granularity=PerChannel(), dynamic=True),
        QuantSpec(bits=3, symmetric=True, granularity=PerGroup(4), dynamic=True, learn=False),
    ],
    ids=["learns", "dynamic", "dynamic-groups"],
)
def test_ranges_that_move(spec):
    model = network(spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=r"weight_quantizer .*freeze_weight_ranges.*moving_ranges"):
        asymq.TransitionRateScheduler(optimizer, model, 10)
    assert len(optimizer.param_groups) == 1
    rates = asymq.TransitionRateScheduler(optimizer, model, 10, moving_ranges=True)

    def values():
        return [model[i].weight_quantizer(model[i].weight).detach() for i in (0, 3)]

    def codes():
        layers = [model[i] for i in (0, 3)]
        options = {"bits": 3, "full_range": spec.full_range}
        return [
            asymq.quantize(m.weight, *m.weight_quantizer.scale_offset(m.weight), **options).int()
            for m in layers
        ]

    for _ in range(3):
        before = codes()
        optimizer_step(model, optimizer)
        rates.step()
        counts = [int((a != b).sum()) for a, b in zip(before, codes(), strict=True)]
        assert rates.transition_rate.tolist() == [count / 128 for count in counts]
        assert sum(counts)
    for value, layer, c in zip(values(), (model[0], model[3]), codes(), strict=True):
        scale, offset = layer.weight_quantizer.scale_offset(layer.weight)
        dtype = torch.int8 if offset is None else torch.uint8
        again = asymq.dequantize(c.to(dtype), scale, offset, bits=3)
        torch.testing.assert_close(value, again, rtol=1e-6, atol=1e-6)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"rule": "harmonic"}, "unknown rule 'harmonic'; there are multiplicative, additive"),
        ({"schedule": "step"}, "unknown schedule 'step'; there are cosine, linear, constant"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"total_steps": 10.5}, "total_steps must be an integer of at least 1, got 10.5"),
        ({"total_steps": True}, "total_steps must be an integer of at least 1, got True"),
        ({"factor": 0}, "factor must be between 0 and 1, got 0"),
        ({"factor": 1.0}, "factor must be between 0 and 1, got 1"),
        ({"factor": math.nan}, "factor must be between 0 and 1, got nan"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": -0.1}, "momentum must be at least 0 and below 1, got -0.1"),
        ({"gain": 0}, "gain must be positive and finite, got 0"),
        ({"gain": True}, "gain must be positive and finite, got True"),
        ({"limit": 0.0}, "limit must be positive, or None for no bound, got 0.0"),
        ({"limit": True}, "limit must be positive, or None for no bound, got True"),
        ({"momentum": "half"}, "momentum must be at least 0 and below 1, got 'half'"),
    ],
    ids=str,
)
def test_arguments(keywords, message):
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=f"^asymq.TransitionRateScheduler: {message}"):
        asymq.TransitionRateScheduler(optimizer, model, **{"total_steps": 10, **keywords})
    assert len(optimizer.param_groups) == 1
    asymq.TransitionRateScheduler(optimizer, model, 10)


def test_optimizers_that_cannot_have_it():
    model = network()

    def make(optimizer, of=model):
        before = [dict(group) for group in optimizer.param_groups]
        hooks = len(optimizer._optimizer_step_pre_hooks)
        try:
            return asymq.TransitionRateScheduler(optimizer, of, 10)
        except ValueError as error:
            assert "\n" not in str(error)
            assert str(error).startswith("asymq.TransitionRateScheduler: ")
            assert [dict(group) for group in optimizer.param_groups] == before
            assert len(optimizer._optimizer_step_pre_hooks) == hooks
            raise

    sgd = torch.optim.SGD(model.parameters())
    for cls in (torch.optim.Adam, torch.optim.AdamW):
        with pytest.raises(ValueError, match="capturable=True"):
            make(cls(model.parameters(), foreach=True))
    with pytest.raises(ValueError, match="LBFGS"):
        make(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="none of the model's quantized weights"):
        make(torch.optim.SGD(network().parameters()))
    with pytest.raises(ValueError, match="none of the model's quantized weights"):
        make(sgd, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="calibrate"):
        fresh = QuantLinear(4, 4, weight=QuantSpec(bits=4, learn=False))
        make(torch.optim.SGD(fresh.parameters()), fresh)
    scheduled = torch.optim.SGD(model.parameters())
    torch.optim.lr_scheduler.StepLR(scheduled, 3)
    with pytest.raises(ValueError, match="LR scheduler"):
        make(scheduled)
    make(sgd)
    with pytest.raises(ValueError, match="already"):
        make(sgd)


# ---- compilers and graphs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, backend", [*((name, "aot_eager") for name in OPTIMIZERS), ("AdamW", "inductor")]
)
def test_compile(name, backend, device):
    # On a GPU, the ways that take their rates as tensors, which a graph can hold.
    options = {} if device.type == "cpu" else {"fused" if name == "SGD" else "capturable": True}
    model = network().to(device)
    runs = []
    for one in (model, copy.deepcopy(model)):
        optimizer = getattr(torch.optim, name)(one.parameters(), lr=0.05, **options)
        rates = asymq.TransitionRateScheduler(optimizer, one, 10, factor=0.05)
        runs.append((one, optimizer, rates, optimizer.step, rates.step))
    model, optimizer, rates, step, rates_step = runs[0]
    step = torch.compile(step, backend=backend)
    rates_step = torch.compile(rates_step, backend=backend, fullgraph=True)
    runs[0] = model, optimizer, rates, step, rates_step
    for _ in range(4):
        for one, optimizer, _, step, rates_step in runs:
            backward(one, optimizer)
            step()
            rates_step()
        for a, b in zip(*(one.parameters() for one, *_ in runs), strict=True):
            # A ten-thousandth of a step of Adam.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)
        lrs = [rates.learning_rate for _, _, rates, *_ in runs]
        torch.testing.assert_close(*lrs, rtol=1e-6, atol=0)
    assert (lrs[0] != 0.05).all()


GRAPHS = [("SGD", {"fused": True}), ("AdamW", {"capturable": True})]
GRAPHS += [("AdamW", {"capturable": True, "fused": True})]
GRAPHS += [("Adam", {"capturable": True, "foreach": True})]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name, options", GRAPHS, ids=str)
def test_capture(name, options):
    golden = next(g for g in GOLDEN if g["optimizer"] == name)
    case, twin = (Case(golden, "cuda", **options) for _ in range(2))

    def step():
        loss = case.step()
        return loss, case.rates.learning_rate

    replay = asymq.capture_step(step)
    unskipped(twin, 3)
    for _ in range(10):
        _, lrs = replay()
        twin.step()
        assert torch.equal(lrs, case.rates.learning_rate)
        for a, b in zip(case.everything(), twin.everything(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name, options", GRAPHS, ids=str)
def test_never_synchronises(name, options):
    golden = next(g for g in GOLDEN if g["optimizer"] == name)
    case = Case(golden, "cuda", **options)
    case.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        case.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- two processes -----------------------------------------------------------------------------

CONFIG = QuantConfig(
    weight=QuantSpec(bits=3, symmetric=True, granularity=PerChannel(), learn=False),
    overrides={
        # Groups along the axis that is split, which end within a process's part.
        "transformer.h.0.mlp.c_fc.weight_quantizer": QuantSpec(
            bits=2, granularity=PerGroup(32), learn=False
        ),
        "transformer.h.1.mlp.c_fc.weight_quantizer": QuantSpec(
            bits=2, granularity=PerGroup(8), learn=False
        ),
        "transformer.h.1.mlp.c_proj.weight_quantizer": QuantSpec(bits=2, learn=False),
        "transformer.h.1.attn.c_attn.weight_quantizer": QuantSpec(
            bits=4, granularity=PerGroup(4, axis=1), learn=False
        ),
    },
)
BATCH = (4, 12)


def language_model():
    # 33 rows of wpe, 97 of wte: the processes' parts differ.
    return prepared(gpt2(vocab_size=97, n_positions=33), CONFIG)


def train(model, batch, wrapped=None, steps=4):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rates = asymq.TransitionRateScheduler(optimizer, model, 10, factor=0.05)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_loss(wrapped or model, batch).backward()
        optimizer.step()
        rates.step()
        seen += [rates.transition_rate, rates.learning_rate]
    return rates, torch.stack(seen)


@functools.cache
def mesh():
    """Of the CPU, also where there is a GPU."""
    return dist.init_device_mesh("cpu", (2,))


def _shards(rank):
    expected_rates, expected = train(language_model(), tokens(*BATCH))
    mine = tokens(*BATCH)[2 * rank : 2 * rank + 2]

    model = language_model()
    for block in model.transformer.h:
        asymq.shard(block, mesh=mesh())
    asymq.shard(model, mesh=mesh())
    probed = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rates = asymq.TransitionRateScheduler(probed, model, 10)
    get_optimizer_state_dict(model, probed)
    rates.step()
    assert probed.state and rates.state_dict()["step"] == 0
    rates, seen = train(model, mine)
    assert rates.names == expected_rates.names
    assert all(hasattr(weight.parameter, "full_tensor") for weight in rates._weights)
    # Both round differently: an element next to a transition point may lie on either side.
    torch.testing.assert_close(seen, expected, rtol=2e-2, atol=1e-3)
    sums = seen.clone()
    dist.all_reduce(sums)
    assert torch.equal(sums, 2 * seen)

    # The first step's counts are exact: they are those of the codes of the whole weights.
    again = language_model()
    codes = {n: weight.codes() for n, weight in _coded(again).items()}
    for name, weight in _coded(model).items():
        full = weight.parameter.full_tensor()
        quantizer = weight.quantizer
        whole = asymq.quantize(full, *quantizer.scale_offset(), **weight.options)
        start = 0 if rank == 0 else len(whole) - len(weight.codes())
        part = whole[start : start + len(weight.codes())]
        assert torch.equal(weight.codes(), part) and codes[name].shape == whole.shape

    replicated = language_model()
    ddp = nn.parallel.DistributedDataParallel(replicated, find_unused_parameters=True)
    _, seen = train(replicated, mine, ddp)
    torch.testing.assert_close(seen, expected, rtol=2e-2, atol=1e-3)

    split = language_model()
    from torch.distributed.fsdp import fully_shard

    fully_shard(split, mesh=mesh())
    with pytest.raises(ValueError, match=r"ranges of .* are split .*asymq\.shard"):
        train(split, mine)


def _coded(model):
    from asymq.training.codes import coded_weights

    return {weight.name: weight for weight in coded_weights(model)}


def test_two_processes_find_one_process_s_rates():
    run(_shards)


# ---- trainers ----------------------------------------------------------------------------------


class StepRates(transformers.TrainerCallback):
    def __init__(self, rates):
        self.rates = rates

    def on_optimizer_step(self, *_, **__):
        self.rates.step()


def test_under_a_trainer(tmp_path):
    """It makes its LR scheduler after the optimizer that it is given."""
    model = prepared(gpt2(), "min_max")
    asymq.freeze_weight_ranges(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rates = asymq.TransitionRateScheduler(optimizer, model, 6)
    data = [{"input_ids": row, "labels": row} for row in tokens(24, 12)]
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        optimizers=(optimizer, None),
        callbacks=[StepRates(rates)],
    )
    used = []

    def keep(*_):
        lrs = [group["lr"] for group in optimizer.param_groups if torch.is_tensor(group["lr"])]
        used.append((torch.stack(lrs).double(), rates.learning_rate))

    optimizer.register_step_pre_hook(keep)
    trainer.train()
    assert trainer.lr_scheduler is not None and len(used) == rates.state_dict()["step"] == 6
    for lrs, expected in used:
        torch.testing.assert_close(lrs, expected, rtol=1e-6, atol=0)
    assert (used[-1][0] != 1e-2).all()
    others = [g["lr"] for g in optimizer.param_groups if not torch.is_tensor(g["lr"])]
    assert others and all(lr == 0 for lr in others)  # where the linear schedule ends


def test_under_accelerate():
    """Its optimizer skips steps that accumulate, its LR scheduler with it."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rates = asymq.TransitionRateScheduler(optimizer, model, 4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    with pytest.raises(ValueError, match="already"):
        asymq.TransitionRateScheduler(optimizer, model, 4)
    for step in range(1, 9):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(8, 16)).square().mean())
            optimizer.step()
            schedule.step()
            rates.step()
            optimizer.zero_grad()
        assert rates.state_dict()["step"] == step // 2
    others = [g["lr"] for g in optimizer.param_groups if not torch.is_tensor(g["lr"])]
    assert others and all(lr == pytest.approx(1e-2) for lr in others)
    assert (rates.learning_rate != 1e-2).all()
