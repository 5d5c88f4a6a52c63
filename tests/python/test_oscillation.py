"""Oscillating weights: the definition against a plain one in float64, what is held, states."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from processes import run
from torch import nn

import asymq
from asymq import OscillationObserver, PerChannel, PerToken, QuantLinear, QuantSpec

ROWS, COLUMNS = 3, 8


def layer(spec, low=-1.0, high=1.0, dtype=None):
    """A linear layer whose rows have ranges of different widths."""
    made = QuantLinear(COLUMNS, ROWS, False, dtype=dtype, weight=spec)
    shape = made.weight_quantizer.range_shape
    width = torch.linspace(1, 2, shape.numel()).view(shape)
    made.weight_quantizer.set_range(low * width, high * width)
    return made


def spec(bits=3, symmetric=False, **more):
    return QuantSpec(bits, symmetric, PerChannel(), "min_max", **more)


def codes_of(quantized):
    scale, offset = quantized.weight_quantizer.scale_offset()
    bits = quantized.weight_quantizer.spec.bits
    return asymq.quantize(quantized.weight, scale, offset, bits=bits)


def set_codes(quantized, codes, noise=0.0):
    """Puts the weights anywhere within the steps of these codes."""
    scale, offset = quantized.weight_quantizer.scale_offset()
    first = 0 if offset is None else offset.round()
    with torch.no_grad():
        quantized.weight.copy_((torch.tensor(codes) + first + noise) * scale)
    assert codes_of(quantized).tolist() == codes.tolist()


class Plain:
    """The definition, an element after the other."""

    def __init__(self, codes, momentum):
        self.m, self.shape = momentum, codes.shape
        self.code = [int(c) for c in codes.flat]
        self.mean = [float(c) for c in codes.flat]
        self.frequency = [0.0] * codes.size
        self.last = [0] * codes.size
        self.held = [False] * codes.size

    def step(self, codes):
        for i, new in enumerate(codes.flat):
            oscillates = 0.0
            if self.held[i]:
                new = self.code[i]
            if new != self.code[i]:
                sign = 1 if new > self.code[i] else -1
                oscillates = float(sign == -self.last[i])
                self.last[i] = sign
            self.frequency[i] = self.m * self.frequency[i] + (1 - self.m) * oscillates
            self.mean[i] = self.m * self.mean[i] + (1 - self.m) * new
            self.code[i] = int(new)

    def freeze(self, threshold):
        for i, frequency in enumerate(self.frequency):
            if frequency > threshold and not self.held[i]:
                self.held[i], self.code[i] = True, round(self.mean[i])

    def array(self, name):
        return np.array(getattr(self, name)).reshape(self.shape)


def walk(bits, symmetric, steps, seed=0):
    """Codes of some weights by step: most rest, some go to and fro, some go anywhere."""
    low, high = asymq.QuantSpec(bits, symmetric).codes if symmetric else (0, 2**bits - 1)
    random = np.random.default_rng(seed)
    first = random.integers(low, high, (ROWS, COLUMNS))
    yield first
    swinging = random.random(first.shape) < 0.5
    for _ in range(steps):
        swing = first + (random.random(first.shape) < 0.3)
        jump = random.integers(low, high + 1, first.shape)
        jumps = random.random(first.shape) < 0.02
        yield np.clip(np.where(jumps, jump, np.where(swinging, swing, first)), low, high)


# ---- the definition ----------------------------------------------------------------------------


def test_first_steps_by_hand():
    quantized = layer(spec())
    still = np.full((ROWS, COLUMNS), 3)
    set_codes(quantized, still)
    observer = OscillationObserver(quantized, momentum=0.5)
    frequencies = []
    for code in (4, 4, 3, 3, 2, 4, 3):  # up, -, down (o), -, down, up (o), down (o)
        codes = still.copy()
        codes[0, 0] = code
        set_codes(quantized, codes)
        observer.step()
        frequencies.append(observer.frequency["weight"][0, 0].item())
    assert frequencies == [0, 0, 0.5, 0.25, 0.125, 0.5625, 0.78125]
    assert observer.frequency["weight"].count_nonzero() == 1
    assert observer.share(0.5).item() == 1 / (ROWS * COLUMNS)
    assert observer.share(0.79).item() == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8, 10, 12])
@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_against_the_plain_definition(device, bits, symmetric, momentum):
    quantized = layer(spec(bits, symmetric), low=-1.0, high=0.7)
    steps = walk(bits, symmetric, 300)
    first = next(steps)
    set_codes(quantized, first)
    quantized.to(device)
    observer, plain = OscillationObserver(quantized, momentum), Plain(first, momentum)
    for step, codes in enumerate(steps):
        set_codes(quantized.cpu(), codes, noise=0.3 * torch.rand(ROWS, COLUMNS))
        quantized.to(device)
        observer.step()
        plain.step(codes)
        frequency = observer.frequency["weight"].double().cpu().numpy()
        # Each step rounds to float16, and a momentum forgets.
        np.testing.assert_allclose(frequency, plain.array("frequency"), atol=2e-3)
        if step == 200:
            threshold = 0.02
            swings = plain.array("frequency")
            sure = abs(swings - threshold) > 2e-3
            observer.freeze(threshold)
            plain.freeze(threshold)
            held = observer.frozen["weight"].cpu().numpy()
            assert (held == plain.array("held"))[sure].all() and held.any() and not held.all()
            at = codes_of(quantized).cpu().numpy()
            # Of what has been far away, float16 knows some 3 digits.
            off = 0.501 + 1e-3 * 2**bits
            assert (abs(at - plain.array("mean")) <= off)[held].all()
            assert (at == codes)[~held].all()
            plain.held, plain.code = held.flatten().tolist(), at.flatten().tolist()


def test_codes_of_16_bits():
    quantized = layer(spec(16))
    set_codes(quantized, np.zeros((ROWS, COLUMNS), dtype=int))
    observer = OscillationObserver(quantized, momentum=0.5)
    for code in (65535, 0, 65535, 0, 0, 0):
        set_codes(quantized, np.full((ROWS, COLUMNS), code))
        observer.step()
    observer.freeze(0.05)
    mean = 0.5 * 65535
    for code in (0, 65535, 0, 0, 0):
        mean = 0.5 * mean + 0.5 * code
    codes = codes_of(quantized)
    assert codes.unique().numel() == 1
    assert codes[0, 0].item() == pytest.approx(mean, rel=2e-3)


# ---- what is held ------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
}


class Run:
    """A layer that learns to be nothing that its grid has, so that codes go to and fro."""

    def __init__(self, optimizer="SGD", learn=False, bias=None, dtype=None):
        torch.manual_seed(0)
        self.layer = layer(spec(learn=learn), dtype=dtype)
        if not learn:
            asymq.freeze_weight_ranges(self.layer)
        self.optimizer = OPTIMIZERS[optimizer](self.layer.parameters())
        self.observer = OscillationObserver(self.layer, momentum=0.9)
        self.x, self.t = torch.randn(16, COLUMNS), torch.randn(16, ROWS)

    def update(self):
        self.layer.zero_grad()
        y = self.layer(self.x.to(self.layer.weight.dtype))
        (y.float() - self.t).square().sum(1).mean().backward()
        self.optimizer.step()

    def step(self, count=1):
        for _ in range(count):
            self.update()
            self.observer.step()

    def held(self):
        return self.observer.frozen["weight"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_held_stays(optimizer):
    case = Run(optimizer)
    case.step(60)
    assert not case.held().any()
    case.observer.freeze(0.1)
    held, weight = case.held().clone(), case.layer.weight.detach().clone()
    assert held.any() and not held.all()
    steps = (weight / case.layer.weight_quantizer.scale_offset()[0])[held]
    torch.testing.assert_close(steps, steps.round())
    before = case.observer.frequency["weight"].clone()
    case.step(20)
    assert torch.equal(case.layer.weight[held], weight[held])
    assert not torch.equal(case.layer.weight[~held], weight[~held])
    fading = case.observer.frequency["weight"][held] / before[held]
    torch.testing.assert_close(fading, torch.full_like(fading, 0.9**20), rtol=0.02, atol=0)
    # More are held later, and none is let go.
    case.observer.freeze(0.05)
    assert case.held()[held].all()


def test_a_held_code_stays_as_the_range_learns():
    case = Run(learn=True)
    case.step(60)
    case.observer.freeze(0.05)
    held, codes = case.held(), codes_of(case.layer)
    assert held.any()
    scale = case.layer.weight_quantizer.scale_offset()[0]
    case.step(30)
    assert not torch.equal(scale, case.layer.weight_quantizer.scale_offset()[0])
    assert torch.equal(codes_of(case.layer)[held], codes[held])


def test_weights_of_16_bits_are_held():
    case = Run(dtype=torch.bfloat16)
    case.step(60)
    case.observer.freeze(0.05)
    held, weight = case.held(), case.layer.weight.detach().clone()
    assert held.any()
    case.step(20)
    assert torch.equal(case.layer.weight[held], weight[held])


@pytest.mark.parametrize("observer_first", [True, False])
def test_a_scheduler_counts_no_change_of_what_is_held(observer_first):
    case = Run()
    rates = asymq.TransitionRateScheduler(case.optimizer, case.layer, 200, limit=None)
    steps = [case.observer.step, rates.step] if observer_first else [rates.step, case.observer.step]
    changes, before = 0, codes_of(case.layer)
    for step in range(120):
        case.update()
        for each in steps:
            each()
        changed = codes_of(case.layer) != before
        assert rates.transition_rate.item() == pytest.approx(changed.double().mean().item())
        before = codes_of(case.layer)
        # What is not held at the mean of its code changes once more when that begins.
        held = case.held().clone()
        if step >= 60:
            changes += int(changed.sum())
            case.observer.freeze(0.1)
            before[held] = codes_of(case.layer)[held]
    assert case.held().any() and changes


def test_the_plain_order_of_steps_is_not_needed_for_ranges_either():
    """Ranges may have an optimizer of their own, which steps after that of the weights."""
    case = Run(learn=True)
    case.optimizer = torch.optim.SGD([case.layer.weight], lr=0.1, momentum=0.5)
    ranges = torch.optim.SGD(asymq.range_parameters(case.layer), lr=0.01)
    case.step(60)
    case.observer.freeze(0.05)
    held, codes = case.held(), codes_of(case.layer)
    for _ in range(20):
        case.update()
        ranges.step()
        assert torch.equal(codes_of(case.layer)[held], codes[held])
    assert held.any()


# ---- states, graphs, processes -----------------------------------------------------------------


@pytest.mark.parametrize("saved_after", [40, 70])
def test_continued_is_bit_equal(saved_after):
    def go(case, steps):
        for step in steps:
            case.step()
            if step >= 60:
                case.observer.freeze(0.1)

    whole = Run()
    go(whole, range(saved_after))
    file = io.BytesIO()
    torch.save([p.state_dict() for p in (whole.layer, whole.optimizer, whole.observer)], file)
    file.seek(0)
    go(whole, range(saved_after, 100))
    other = Run()
    states = torch.load(file, weights_only=True)
    for part, state in zip((other.layer, other.optimizer, other.observer), states, strict=True):
        part.load_state_dict(state)
    go(other, range(saved_after, 100))
    assert whole.held().any()
    assert torch.equal(whole.layer.weight, other.layer.weight)
    one, two = (case.observer.state_dict()["weights"]["weight"] for case in (whole, other))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_memory_is_two_bytes_and_two_halves():
    state = OscillationObserver(layer(spec(8))).state_dict()["weights"]["weight"]
    assert sorted(t.element_size() for t in state.values()) == [1, 1, 2, 2]
    assert {t.shape for t in state.values()} == {(ROWS, COLUMNS)}


def test_a_state_is_no_view():
    case = Run()
    state = case.observer.state_dict()
    kept = copy.deepcopy(state)
    case.step(30)
    assert torch.equal(
        state["weights"]["weight"]["frequency"], kept["weights"]["weight"]["frequency"]
    )


def test_an_observer_that_is_gone_holds_nothing():
    case = Run()
    case.step(60)
    case.observer.freeze(0.05)
    held, weight = case.held().clone(), case.layer.weight.detach().clone()
    assert held.any()
    case.observer = None
    for _ in range(3):
        case.update()
    assert not torch.equal(case.layer.weight[held], weight[held])


def test_tied_weights_are_observed_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    asymq.prepare(model, asymq.QuantConfig(weight=QuantSpec(4)))
    asymq.calibrate(model, [torch.randn(2, 4)])
    assert len(OscillationObserver(model).frequency) == 1


@pytest.mark.gpu
def test_captured_steps_are_those_of_python():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")

    def make():
        case = Run("AdamW")
        case.layer.cuda()
        case.x, case.t = case.x.cuda(), case.t.cuda()
        parameters = case.layer.parameters()
        case.optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5, capturable=True)
        case.observer = OscillationObserver(case.layer, momentum=0.9)

        def step():
            case.step()
            case.observer.freeze(0.1)

        return case, step

    (captured, one), (plain, two) = make(), make()
    replay = asymq.capture_step(one)
    for _ in range(60):
        replay()
    for _ in range(63):
        two()
    assert captured.held().any()
    assert torch.equal(captured.held(), plain.held())
    assert torch.equal(captured.layer.weight, plain.layer.weight)


def _sharded(rank, folder):
    case, alone = Run(), Run()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    asymq.shard(case.layer, mesh=mesh)
    case.optimizer = OPTIMIZERS["SGD"](case.layer.parameters())
    case.observer = OscillationObserver(case.layer, momentum=0.9)
    for one in (case, alone):
        one.step(60)
        one.observer.freeze(0.1)
        one.step(10)
    assert alone.held().any()
    own = slice(0, 2) if rank == 0 else slice(2, 3)
    for name in ("frequency", "frozen"):
        parts = [getattr(one.observer, name)["weight"] for one in (case, alone)]
        assert torch.equal(parts[0], parts[1][own])
    assert torch.equal(case.layer.weight.full_tensor(), alone.layer.weight)
    assert case.observer.share(0.02) == alone.observer.share(0.02) > 0


@pytest.mark.slow
def test_two_processes_observe_what_one_does(tmp_path):
    run(_sharded, tmp_path)


# ---- refusals ----------------------------------------------------------------------------------


def refused(model, message, **more):
    with pytest.raises(ValueError, match=message) as caught:
        OscillationObserver(model, **more)
    assert "\n" not in str(caught.value)


def test_refusals():
    for momentum in (-0.1, 0.9999, float("nan"), False):
        refused(layer(spec()), "momentum must be from 0 to 0.999", momentum=momentum)
    refused(nn.Linear(2, 2), "no quantized weights")
    frozen = layer(spec())
    asymq.freeze_weights(frozen)
    refused(frozen, "no quantized weights that require grad")
    refused(QuantLinear(4, 4, weight=spec()), "is not set; calibrate")
    dynamic = QuantSpec(4, granularity=PerChannel(), dynamic=True)
    refused(QuantLinear(4, 4, weight=dynamic), "is dynamic.*static range")
    inputs = QuantLinear(4, 4, weight=spec(), input=QuantSpec(8, granularity=PerToken()))
    inputs.weight_quantizer.set_range(-torch.ones(4, 1), torch.ones(4, 1))
    assert OscillationObserver(inputs).frequency
    for threshold in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"freeze: threshold must be between 0 and 1"):
            OscillationObserver(layer(spec())).freeze(threshold)
    with pytest.raises(ValueError, match=r"share: threshold must be a number, got nan"):
        OscillationObserver(layer(spec())).share(float("nan"))


@pytest.mark.parametrize("other", [layer(spec(10)), nn.Sequential(layer(spec()))])
def test_a_state_of_other_weights_is_refused(other):
    case = Run()
    case.step(30)
    before = case.observer.state_dict()
    with pytest.raises(ValueError, match=r"of other weights.*weight"):
        case.observer.load_state_dict(OscillationObserver(other).state_dict())
    after = case.observer.state_dict()
    assert json.dumps(before, default=str) == json.dumps(after, default=str)
