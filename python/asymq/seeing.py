"""What quantizers do to a model, and how their ranges move: `diagnose`, `RangeLogger` and
`plot_ranges`."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asymq import ops
from asymq._arguments import is_integer
from asymq.calibration import batch_of, call
from asymq.quantizers import OFF, Quantizer, named_quantizers
from asymq.summary import table
from asymq.wrappers import evaluating, unwrap

_TITLES = ("name", "kind", "bits", "SQNR dB", "clipped", "used levels")


@dataclass(frozen=True)
class Diagnosed:
    """One quantizer. sqnr_db: 10·log10(Σx² / Σ(x - x̂)²). clipped: share of the elements outside
    the range. used_levels: share of the levels of its grids that occur. loss_increase: of the loss
    with this quantizer alone; None: not asked for."""

    name: str
    kind: str
    bits: int
    sqnr_db: float
    clipped: float
    used_levels: float
    loss_increase: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """rows: worst first. str() is a table."""

    rows: tuple[Diagnosed, ...]

    def __str__(self) -> str:
        with_loss = any(row.loss_increase is not None for row in self.rows)
        titles = (*_TITLES, "loss increase") if with_loss else _TITLES
        return "\n".join(table(titles, map(_cells, self.rows)))


def diagnose(model: nn.Module, batch: Any, *, loss: bool = False) -> Diagnosis:
    """What each quantizer alone does to what the float model gives it, from one forward of `batch`
    (as `calibrate` takes one), in evaluation mode with every quantizer off.

    loss: also how much the model's loss grows with one quantizer on, in a forward for each; needs
    labels in the batch. Sorted by that then, else by sqnr_db, worst first; quantizers that nothing
    or a constant reached have nan and come last. States and modes are restored.

    ValueError, before anything runs: no quantizer; loss without labels. RuntimeError: none is
    calibrated; a range that is reached is not set.
    """
    what = "asymq.diagnose"
    model = unwrap(model)
    quantizers = list(named_quantizers(model))
    if not quantizers:
        raise ValueError(f"{what}: the model has no quantizers; call asymq.prepare first")
    if not any(quantizer.calibrated for _, quantizer in quantizers):
        raise RuntimeError(f"{what}: no range is set; calibrate the model first (asymq.calibrate)")
    batch = batch_of(model, batch, what)
    if loss and not (isinstance(batch, dict) and batch.get("labels") is not None):
        raise ValueError(
            f"{what}: loss=True needs labels: give a dict with them, for the model's own loss"
        )
    states = [(quantizer, quantizer.state) for _, quantizer in quantizers]
    found = {quantizer: _Error(quantizer) for _, quantizer in quantizers}
    losses = []
    try:
        with torch.no_grad(), evaluating(model):
            for quantizer, error in found.items():
                quantizer.start_observing(error.see)
            output = call(model, batch)
            for quantizer in found:
                quantizer.take_observed()
                quantizer.state = OFF
            if loss:
                losses = [_loss_of(output)]
                for quantizer in found:
                    # What was not reached before would be off in this forward, too.
                    quantizer.state = "quantizing" if found[quantizer].count else OFF
                    losses.append(_loss_of(call(model, batch)))
                    quantizer.state = OFF
    finally:
        for quantizer, state in states:
            quantizer.take_observed()
            quantizer.state = state
    increases: list[float | None] = [None] * len(quantizers)
    if losses:
        values = torch.stack(losses).double()
        increases = (values[1:] - values[0]).tolist()
    rows = []
    for (name, quantizer), increase in zip(quantizers, increases, strict=True):
        error = found[quantizer]
        if increase is not None and not error.count:
            increase = math.nan
        rows.append(Diagnosed(name, quantizer.kind, quantizer.spec.bits, *error.result(), increase))
    return Diagnosis(tuple(sorted(rows, key=_badness)))


class _Error:
    """Of the tensors that one quantizer is given in a forward."""

    def __init__(self, quantizer: Quantizer):
        self._quantizer = quantizer
        self.count = 0
        self._sums: Tensor | None = None
        self._extrema: tuple[Tensor, Tensor] | None = None
        self._levels: Tensor | None = None
        self._live: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        self.count += x.numel()
        quantizer = self._quantizer
        spec = quantizer.spec
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        error = wide - quantizer.fake_quantize(wide)
        rows, scale, offset = quantizer.grids(wide)
        if offset is None:
            first, last = spec.codes
            high = scale * spec.end_in_steps
            low = -high
        else:
            first, last = 0, spec.steps
            low, high = scale * offset, scale * (offset + spec.steps)
        # The ends come from the scale, which was rounded.
        slack = 2.0**-20 * torch.maximum(low.abs(), high.abs())
        clipped = (rows < low - slack) | (rows > high + slack)
        sums = torch.stack(
            [part.sum(dtype=torch.float64) for part in (wide.square(), error.square(), clipped)]
        )
        self._sums = sums if self._sums is None else self._sums + sums
        low, high = torch.aminmax(wide)
        if self._extrema is not None:
            low, high = torch.minimum(low, self._extrema[0]), torch.maximum(high, self._extrema[1])
        self._extrema = low, high
        options = {"bits": spec.bits, "eps": spec.eps, "full_range": spec.full_range}
        codes = ops.quantize(rows, scale, offset, **options).long() - first  # type: ignore[arg-type]
        levels = torch.zeros(len(rows), last - first + 1, dtype=torch.bool, device=x.device)
        levels.scatter_(1, codes, True)
        if quantizer.live:
            self._live.append(levels.double().mean())
        else:
            self._levels = levels if self._levels is None else self._levels | levels

    def result(self) -> tuple[float, float, float]:
        """sqnr_db, clipped, used_levels."""
        if self._sums is None or self._extrema is None:
            return math.nan, math.nan, math.nan
        used = (
            torch.stack(self._live).mean() if self._levels is None else self._levels.double().mean()
        )
        square, error, clipped, used, low, high = torch.stack(
            [*self._sums, used, *(end.double() for end in self._extrema)]
        ).tolist()
        if low == high:
            return math.nan, math.nan, math.nan
        sqnr = 10 * math.log10(square / error) if error else math.inf
        return sqnr, clipped / self.count, used


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "asymq.diagnose: loss=True needs a model that returns its loss of the labels"
        )
    return loss.detach()


def _badness(row: Diagnosed) -> tuple[bool, float]:
    value = row.sqnr_db if row.loss_increase is None else -row.loss_increase
    return math.isnan(row.sqnr_db) or math.isnan(value), value


def _cells(row: Diagnosed) -> tuple[str, ...]:
    cells = [row.name, row.kind, str(row.bits), f"{row.sqnr_db:.1f}"]
    cells += [f"{row.clipped:.2%}", f"{row.used_levels:.1%}"]
    return (*cells, *([] if row.loss_increase is None else [f"{row.loss_increase:+.4f}"]))


# ---- ranges while they learn ---------------------------------------------------------------------


class RangeLogger:
    """Logs the ranges of a model while they learn.

        logger = asymq.RangeLogger(model, SummaryWriter())
        ...
        loss.backward()
        logger.step(n)  # before zero_grad: gradients are logged, too

    log: a SummaryWriter (what has add_scalar), or called with a dict of numbers and the step.
    every: steps from one entry to the next.

    "range/<name>/low" and "/high": the outermost ends of a quantizer, of a dynamic one its largest
    factors by name. "collapsed/<kind>": share of the ranges that have collapsed (`summary`).
    "range_gradient/<kind>": norm of the gradients of all ranges of a kind, while there are some.
    Ranges that are not set are left out.

    ValueError: no quantizer; `every` is no integer of at least 1. TypeError: a log that is neither.
    """

    def __init__(self, model: nn.Module, log: Any, every: int = 100):
        what = "asymq.RangeLogger"
        self._quantizers = list(named_quantizers(unwrap(model)))
        if not self._quantizers:
            raise ValueError(f"{what}: the model has no quantizers; call asymq.prepare first")
        if not (is_integer(every) and every >= 1):
            raise ValueError(f"{what}: every must be an integer of at least 1, got {every!r}")
        if not hasattr(log, "add_scalar") and not callable(log):
            raise TypeError(
                f"{what}: log must have add_scalar or be callable, got {type(log).__name__}"
            )
        self._log, self._every = log, every

    @torch.no_grad()
    def step(self, n: int) -> None:
        """Logs step n, a multiple of `every`: one transfer from the device."""
        if n % self._every:
            return
        tensors: dict[str, Tensor] = {}
        collapsed: defaultdict[str, list[Tensor]] = defaultdict(list)
        gradients: defaultdict[str, list[Tensor]] = defaultdict(list)
        for name, quantizer in self._quantizers:
            grads = [p.grad for p in quantizer.parameters(recurse=False) if p.grad is not None]
            gradients[quantizer.kind] += [torch.linalg.vector_norm(grad) for grad in grads]
            if quantizer.live:
                for factor in quantizer.learned:
                    tensors[f"range/{name}/{factor}"] = getattr(quantizer, factor).amax()
            elif quantizer.calibrated:
                low, high = quantizer.bounds()
                tensors |= {f"range/{name}/low": low.amin(), f"range/{name}/high": high.amax()}
            found = quantizer.collapsed()
            if found is not None:
                collapsed[quantizer.kind].append(found.flatten())
        device = self._quantizers[0][1].device
        for kind, parts in collapsed.items():
            tensors[f"collapsed/{kind}"] = torch.cat([p.to(device) for p in parts]).double().mean()
        for kind, norms in gradients.items():
            if norms:
                norm = torch.linalg.vector_norm(torch.stack([x.to(device) for x in norms]))
                tensors[f"range_gradient/{kind}"] = norm
        if not tensors:
            return
        values = torch.stack([x.to(device, torch.float64) for x in tensors.values()]).tolist()
        numbers = dict(zip(tensors, values, strict=True))
        if hasattr(self._log, "add_scalar"):
            for key, value in numbers.items():
                self._log.add_scalar(key, value, n)
        else:
            self._log(numbers, n)


def plot_ranges(model: nn.Module, path: str | Path) -> None:
    """Draws the outermost ends of every stored range, in the model's order, one picture for each
    kind, beside those that calibration gave it. path: of the file, whose suffix is its format
    (.png, .svg, .pdf).

    RuntimeError: there is no range that is stored and set. ImportError: there is no matplotlib.
    """
    by_kind: defaultdict[str, list[Quantizer]] = defaultdict(list)
    for _, quantizer in named_quantizers(unwrap(model)):
        if quantizer.calibrated and not quantizer.live:
            by_kind[quantizer.kind].append(quantizer)
    if not by_kind:
        raise RuntimeError(
            "asymq.plot_ranges: there is no stored range that is set; calibrate the model first "
            "(asymq.calibrate); dynamic ranges have no ends of their own"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("asymq.plot_ranges needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 3 * len(by_kind)), layout="constrained")
    axes = figure.subplots(len(by_kind), squeeze=False)[:, 0]
    for axis, (kind, quantizers) in zip(axes, by_kind.items(), strict=True):
        for initial, label, style in ((True, "calibrated", "k_"), (False, "now", "C0.")):
            ends = [
                torch.stack([low.amin(), high.amax()]).cpu()
                for low, high in (quantizer.bounds(initial) for quantizer in quantizers)
            ]
            for i, values in enumerate(torch.stack(ends, 1).tolist()):
                axis.plot(values, style, label=None if i else label)
        axis.set(title=kind, xlabel="quantizer, in the model's order", ylabel="ends of the range")
        axis.legend()
    figure.savefig(path)
