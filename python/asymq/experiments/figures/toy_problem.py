"""The paper's controlled experiment: learn the range of one tensor under Adam.

10,000 samples, the whole of them every step, mean squared error between x and x̂ (eq. 2), float64.
The seeds of a curve are independent problems. They are the channels of one tensor [seeds, samples]
with a range each, and what is differentiated is the sum of their errors: every range then gets the
gradient of its own problem, and Adam works element by element.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import asymq
from asymq import PerChannel, QuantAct, QuantSpec
from asymq.quantizers import LINKS, Quantizer
from asymq.training.step_rules import StepRule

SAMPLES = 10_000
DRIFT = 10.0  # how much wider drifting data become
# The definitions of "converged" and of an oscillation.
NEAR, STILL, STILL_STEPS, OSCILLATION_STEPS = 1.1, 0.02, 1000, 500


@dataclass(frozen=True)
class Variant:
    """A parameterization, perhaps with an end frozen or a step rule. label: the paper's name.
    options: of QuantSpec. rule: of asymq.attach_step_rule."""

    label: str
    options: dict = field(hash=False)
    rule: str | None = None


def _named(name: str, **options) -> dict:
    return {"parameterization": name, **options}


VARIANTS = {
    "scale_offset": Variant("scale/offset", _named("scale_offset")),
    "min_max": Variant("min/max", _named("min_max")),
    "beta_gamma": Variant("beta/gamma", _named("beta_gamma")),
    **{
        f"beta_gamma_{link}": Variant(f"beta/gamma {link}", _named("beta_gamma", link=link))
        for link in LINKS[1:]
    },
    "beta_gamma_dynamic": Variant("dynamic beta/gamma", _named("beta_gamma", dynamic=True)),
    "min_max_plus": Variant("min/max+", _named("min_max"), "min_max_plus"),
    "min_max_frozen": Variant("min/max, θmin frozen", _named("min_max", fix_min=True)),
    "naive": Variant("naive", _named("scale_offset"), "naive"),
    "naive_current": Variant("naive, current values", _named("scale_offset"), "naive_current"),
    "sophisticated": Variant("sophisticated", _named("scale_offset"), "sophisticated"),
    "kscale_koffset": Variant("kscale/koffset", _named("kscale_koffset")),
    "symmetric_scale": Variant("symmetric s", _named("scale_offset", symmetric=True)),
    "symmetric_max": Variant("symmetric θmax", _named("min_max", symmetric=True)),
    "symmetric_gamma": Variant("symmetric γ", _named("beta_gamma", symmetric=True)),
}


@dataclass(frozen=True)
class Data:
    """Normal samples and where their range starts.

    std: standard deviation. relu: negative samples become 0. reach: θmax starts at reach·max(x),
    θmin at min(x) (symmetric: θmax at reach·max|x|). drifting: after a fifth of the steps the
    samples widen, DRIFT times up to four fifths, then keep that.
    """

    std: float = 1.0
    relu: bool = False
    reach: float = 3.0
    drifting: bool = False

    def samples(self, seeds: int) -> Tensor:
        """float64 [seeds, SAMPLES]; those of a seed do not depend on how many seeds there are."""
        rows = (np.random.default_rng(seed).standard_normal(SAMPLES) for seed in range(seeds))
        x = self.std * torch.from_numpy(np.stack(list(rows)))
        return x.clamp(min=0) if self.relu else x

    def widths(self, steps: int) -> Tensor:
        """The factor of the samples at steps 0 to `steps`."""
        done = torch.arange(steps + 1, dtype=torch.float64) / max(1, steps)
        rise = ((done - 0.2) / 0.6).clamp(0, 1) if self.drifting else torch.zeros_like(done)
        return DRIFT**rise


@dataclass(frozen=True)
class Curve:
    """One line of a figure, of all seeds. name: of VARIANTS; lr: as typed. chain_rule:
    symmetric learning rates scaled such that s, θmax and γ move θmax alike (Table 3)."""

    name: str
    bits: int
    lr: str
    data: Data
    chain_rule: bool = False

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.name]

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, granularity=PerChannel(0), **self.variant.options)

    @property
    def target(self) -> Target:
        return Target(self.data.std, self.data.relu, self.bits, self.spec.symmetric)

    def __str__(self) -> str:
        return f"{self.variant.label} {self.lr}, {self.bits} bits"


@dataclass(frozen=True)
class Target:
    """What a curve's best range depends on."""

    std: float
    relu: bool
    bits: int
    symmetric: bool


@dataclass(frozen=True)
class Best:
    """The best range by brute force, each of shape [seeds]. Only its scale and where its grid
    starts decide the error, so that other ends may be as good."""

    low: Tensor
    high: Tensor
    mse: Tensor


@dataclass(frozen=True)
class Run:
    """A trained curve at steps 0 to n, every tensor [n + 1, seeds] in float64.

    low, high: the ends θmin and θmax of the range, s·z and s·(z + k) (symmetric: ∓s·k/2). learned:
    the parameters. ratio: the error over that of the best range.
    """

    curve: Curve
    low: Tensor
    high: Tensor
    learned: dict[str, Tensor]
    ratio: Tensor

    @property
    def steps(self) -> int:
        return len(self.low) - 1

    def some_steps(self, count: int) -> list[int]:
        """At most `count` + 1 steps, first and last among them, closer to each other in the
        beginning, where ranges move most."""
        chosen = (round(self.steps * (i / count) ** 2) for i in range(count + 1))
        return list(dict.fromkeys(chosen))

    @property
    def span(self) -> Tensor:
        return self.high[-1] - self.low[-1]

    @property
    def scale(self) -> Tensor:
        return (self.high - self.low) / self.curve.spec.steps

    @property
    def offset(self) -> Tensor:
        return self.low / self.scale

    @property
    def final_ratio(self) -> Tensor:
        return self.ratio[-1]

    @property
    def drift(self) -> Tensor:
        """How far an end is from where it was 1,000 steps (at most a fifth of all) before, as a
        fraction of the final span: the larger of both ends."""
        before = self.steps - min(STILL_STEPS, self.steps // 5)
        moved = [(end[-1] - end[before]).abs() for end in (self.low, self.high)]
        return torch.maximum(*moved) / self.span

    @property
    def converged(self) -> Tensor:
        return (self.final_ratio < NEAR) & (self.drift < STILL)

    @property
    def oscillation(self) -> Tensor:
        """Peak to peak over the last 500 steps (at most a tenth of all), as a fraction of the
        final span: the larger of both ends."""
        steps = slice(-1 - min(OSCILLATION_STEPS, self.steps // 10), None)
        wide = [end[steps].amax(0) - end[steps].amin(0) for end in (self.low, self.high)]
        return torch.maximum(*wide) / self.span

    def arrival(self, near: float = 1.05) -> Tensor:
        """The first step whose error is at most `near` times the best; infinite if none is."""
        arrived = self.ratio <= near
        first = arrived.int().argmax(0).double()
        return torch.where(arrived.any(0), first, math.inf)


# ---- training ----------------------------------------------------------------------------------


def _chain_rule(quantizer: Quantizer, name: str) -> Tensor:
    """The step of θmax is k/2 times that of s and θmax (the constant) times that of γ."""
    value = getattr(quantizer, name).detach()
    if name == "scale":
        return torch.full_like(value, 2 / quantizer.spec.steps)
    return 1 / quantizer.get_buffer("max") if name == "gamma" else torch.ones_like(value)


def train(curve: Curve, seeds: int, steps: int, best: Best) -> Run:
    """Learns the ranges of a curve's seeds for `steps` steps of Adam."""
    spec, x = curve.spec, curve.data.samples(seeds)
    quantizer = QuantAct(spec, seeds, dtype=torch.float64)
    low, high = x.amin(1), curve.data.reach * x.amax(1)
    if spec.symmetric:
        high = curve.data.reach * x.abs().amax(1)
    if not spec.dynamic:
        quantizer.set_range(low, high)
    optimizer = torch.optim.Adam(asymq.range_parameters(quantizer, lr=float(curve.lr)))
    if curve.variant.rule:
        asymq.attach_step_rule(optimizer, quantizer, curve.variant.rule)
    if curve.chain_rule:
        StepRule(optimizer, _chain_rule, [(quantizer, name) for name in quantizer.learned])

    widths = curve.data.widths(steps)
    parameters = {name: getattr(quantizer, name).detach() for name in quantizer.learned}
    learned = {name: x.new_empty(steps + 1, seeds) for name in parameters}
    mse = x.new_empty(steps + 1, seeds)
    for step in range(steps + 1):
        now = x * widths[step] if curve.data.drifting else x
        quantized = quantizer(now)
        residual = quantized.detach() - now
        mse[step] = torch.linalg.vector_norm(residual, dim=1).square_() / SAMPLES
        for name, parameter in parameters.items():
            learned[name][step] = parameter
        if step < steps:
            optimizer.zero_grad()
            # The gradient of the sum of the problems' mean squared errors.
            quantized.backward(residual.mul_(2 / SAMPLES))
            optimizer.step()

    if spec.dynamic:
        live = widths[:, None] * x.amin(1), widths[:, None] * x.amax(1)
        constants = dict(zip(("min", "max"), live, strict=True))
    else:
        constants = {n: getattr(quantizer, n).expand(steps + 1, -1) for n in quantizer.constants}
    tensors = learned | constants
    scale, offset = asymq.effective_scale_offset(
        spec.parameterization,
        *(tensors[name] for name in spec.learnable + spec.constant),
        bits=spec.bits,
        symmetric=spec.symmetric,
        link=spec.link,
        eps=spec.eps,
    )
    first = -spec.steps / 2 if offset is None else offset
    ends = scale * first, scale * (first + spec.steps)
    return Run(curve, *ends, learned, mse / (best.mse * widths[:, None].square()))


# ---- the best range ----------------------------------------------------------------------------

_GRID, _ROUNDS, _ZOOM, _AT_ONCE = 25, 6, 4, 125


def best_ranges(target: Target, seeds: int) -> Best:
    """Searches θmin and θmax (symmetric: θmax) on a grid over everything from 0 to 1.2 times the
    extrema of each seed's samples, then on ever finer grids around the best one."""
    found = [_best_range(x, target) for x in Data(std=target.std, relu=target.relu).samples(seeds)]
    return Best(*(torch.stack(values) for values in zip(*found, strict=True)))


def _best_range(x: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    repeated = x.repeat(_AT_ONCE, 1)
    furthest = torch.stack((x.min(), x.max()))
    if target.symmetric:
        furthest = x.abs().max() * torch.tensor([-1.0, 1.0], dtype=x.dtype)
    centre, width = torch.full((2,), 0.6, dtype=x.dtype), 0.6
    best = torch.tensor(math.inf, dtype=x.dtype)
    for _ in range(_ROUNDS):
        axis = torch.linspace(-width, width, _GRID, dtype=x.dtype)
        low, high = ((c + axis).clamp(min=0) * end for c, end in zip(centre, furthest, strict=True))
        if target.symmetric:
            pairs = torch.stack((-high, high), dim=1)
        else:
            pairs = torch.cartesian_prod(low.unique(), high)
        for some in pairs.split(_AT_ONCE):
            low, high = some[:, :1].contiguous(), some[:, 1:].contiguous()
            rows = repeated[: len(some)]
            if target.symmetric:
                quantized = asymq.fake_quantize_symmetric_max(rows, high, bits=target.bits)
            else:
                quantized = asymq.fake_quantize_min_max(rows, low, high, bits=target.bits)
            mse = torch.linalg.vector_norm(quantized - rows, dim=1).square() / len(x)
            least = mse.argmin()
            if mse[least] < best:
                best, ends = mse[least], some[least]
        centre = torch.where(furthest == 0, 0.0, ends / furthest)
        width /= _ZOOM
    return ends[0], ends[1], best


# ---- many curves -------------------------------------------------------------------------------


def run_all(
    curves: list[Curve], seeds: int, steps: int, workers: int
) -> tuple[dict[Curve, Run], dict[Target, Best]]:
    """Trains the curves in `workers` processes of one thread each, with a progress bar.

    The results do not depend on `workers`.
    """
    curves = list(dict.fromkeys(curves))
    targets = list(dict.fromkeys(curve.target for curve in curves))
    with _Pool(min(workers, len(curves)), len(targets) + len(curves)) as pool:
        best = pool.map(best_ranges, {target: (target, seeds) for target in targets})
        runs = pool.map(train, {c: (c, seeds, steps, best[c.target]) for c in curves})
    return runs, best


def _start_worker() -> None:
    """An interrupt ends the process without a message: its parent has one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


class _Pool:
    """Processes that work through calls of a function; one alone needs no process."""

    def __init__(self, workers: int, calls: int):
        self._executor = None
        if workers > 1:
            self._executor = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
        self._bar = tqdm(total=calls, desc="training", unit="curve", smoothing=0.1)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable, calls: dict) -> dict:
        """The results of function(*arguments) for every key: arguments of `calls`."""
        results = dict.fromkeys(calls)
        if self._executor is None:
            for key, arguments in calls.items():
                results[key] = function(*arguments)
                self._bar.update()
            return results
        futures = {self._executor.submit(function, *a): key for key, a in calls.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            self._bar.update()
        return results
