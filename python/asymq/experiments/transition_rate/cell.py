"""One run: a quantized model that learns with one optimizer and one method."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import asymq
from asymq.experiments.common.files import write
from asymq.experiments.common.provenance import provenance
from asymq.experiments.table2.results import read_checkpoint
from asymq.experiments.transition_rate.protocol import RATES
from asymq.experiments.transition_rate.results import (
    Cell,
    checkpoint_path,
    result_path,
)
from asymq.experiments.transition_rate.tasks import Task
from asymq.training.codes import Counter, coded_weights

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=1e-4, fused=True),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, fused=True),
}
# Of Adam, for the ranges of every run; their parameters are factors.
RANGE_RATE = 1e-3
POINTS = 50  # of a series
BINS = 20  # of distances, from 0 to half a step
SHOWN = 50  # times a run


def settings_of(cell: Cell, task: Task) -> dict:
    """What a run's result depends on beside its name."""
    settings = {**task.settings, "range_rate": RANGE_RATE}
    if cell.method != "freeze":
        del settings["threshold"]
    return settings | ({"rate": RATES[cell.optimizer][1]} if cell.method == "factor" else {})


def run_cell(
    cell: Cell,
    task: Task,
    out: Path,
    device: torch.device,
    checkpoint_every: int,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Runs what is left of a run and writes its result. `show` is told of some steps' losses."""
    run = Run(cell, task, device)
    saved = read_checkpoint(checkpoint_path(out, cell))
    if saved:
        run.restore(saved)
    began, first = time.perf_counter(), run.step
    while run.step < run.steps:
        run.take_step()
        if run.step % max(1, run.steps // SHOWN) == 0:
            loss = run.series["loss"][run.step - 1].item()
            show(run.step, loss)
            if not math.isfinite(loss):
                break
        if run.step % checkpoint_every == 0 and run.step < run.steps:
            write(checkpoint_path(out, cell), lambda path: torch.save(run.state_dict(), path))
    seconds = (time.perf_counter() - began) / max(1, run.step - first)
    write(result_path(out, cell), json.dumps(run.result(seconds)))
    checkpoint_path(out, cell).unlink(missing_ok=True)


class Run:
    """A run's model, optimizers and method, and how far they are."""

    def __init__(self, cell: Cell, task: Task, device: torch.device):
        self.cell, self.task, self.device = cell, task, device
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        assert task.protocol.steps is not None
        self.steps, self.step = task.protocol.steps, 0
        torch.manual_seed(cell.seed)
        self.model = task.quantized(cell.bits, cell.seed).to(device)
        task.calibrate(self.model, cell.seed, device)
        if cell.method in ("fixed", "factor"):
            asymq.freeze_weight_ranges(self.model)
        self.weights = list(coded_weights(self.model))
        rate = float(RATES[cell.optimizer][1] if cell.method == "factor" else cell.value)
        self.optimizer = OPTIMIZERS[cell.optimizer](asymq.weight_parameters(self.model), rate)
        ranges = torch.optim.Adam(asymq.range_parameters(self.model), lr=RANGE_RATE)
        self.rates = self.observer = None
        if cell.method == "factor":
            self.rates = asymq.TransitionRateScheduler(
                self.optimizer, self.model, self.steps, factor=float(cell.value)
            )
        elif cell.method == "freeze":
            self.observer = asymq.OscillationObserver(self.model)
        self.optimizers = (self.optimizer, ranges)
        cosine = torch.optim.lr_scheduler.LambdaLR
        self.cosines = [cosine(one, self.falling) for one in self.optimizers]
        self.counter = Counter(self.weights)
        self.counter.start()
        names = ["loss", "flips"]
        names += ["running", "target", "rate"] if self.rates else []
        names += ["frozen"] if self.observer else []
        self.series = {name: torch.zeros(self.steps, device=device) for name in names}
        sizes = [weight.parameter.numel() for weight in self.weights]
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device=device)
        self.before = distances(self.weights)
        self.first_score = task.score(self.model, device)

    def falling(self, step: int) -> float:
        """From 1 to 0 along a cosine."""
        return (1 + math.cos(math.pi * step / self.steps)) / 2

    def take_step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        batch = self.task.batch(self.step, self.cell.seed, self.device)
        loss = self.task.loss(self.model, batch)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.rates is not None:
            self.rates.step()
        if self.observer is not None:
            self.observer.step()
            # From four times the threshold down to it, as the paper's.
            threshold = self.task.protocol.threshold
            self.observer.freeze(threshold * (1 + 3 * self.falling(self.step)))
        for cosine in self.cosines:
            cosine.step()
        self._note(loss.detach())
        self.step += 1

    def _note(self, loss: Tensor) -> None:
        values = {"loss": loss, "flips": self.counter.count().sum() / self.sizes.sum()}
        if self.rates is not None:
            tensors = (self.rates.running_rate, self.rates.target_rate, self.rates.learning_rate)
            means = [(tensor * self.sizes).sum() / self.sizes.sum() for tensor in tensors]
            values |= dict(zip(("running", "target", "rate"), means, strict=True))
        if self.observer is not None:
            frozen = [held.sum() for held in self.observer.frozen.values()]
            values["frozen"] = torch.stack(frozen).sum() / self.sizes.sum()
        for name, value in values.items():
            self.series[name][self.step] = value

    # ---- states --------------------------------------------------------------------------------

    def _parts(self) -> dict:
        parts: dict[str, Any] = {"rates": self.rates, "observer": self.observer}
        parts |= {f"optimizer{i}": one for i, one in enumerate(self.optimizers)}
        parts |= {f"cosine{i}": one for i, one in enumerate(self.cosines)}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "series": {name: values[: self.step].clone() for name, values in self.series.items()},
            "before": self.before,
            "first_score": self.first_score,
            "model": self.model.state_dict(),
            **{name: part.state_dict() for name, part in self._parts().items()},
            "settings": settings_of(self.cell, self.task),
        }

    def restore(self, saved: dict) -> None:
        self.step, self.before = saved["step"], saved["before"]
        self.first_score = saved["first_score"]
        self.model.load_state_dict(saved["model"])
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        for name, values in saved["series"].items():
            self.series[name][: self.step] = values
        self.counter.start()

    def result(self, seconds: float) -> dict:
        finite = self.step == self.steps and bool(self.series["loss"].isfinite().all())
        score = self.task.score(self.model, self.device) if finite else math.nan
        return {
            "score": score if math.isfinite(score) else None,
            "first_score": self.first_score,
            "metric": self.task.metric,
            "higher_is_better": self.task.higher_is_better,
            "steps": self.steps,
            "weights": int(self.sizes.sum()),
            "seconds_per_step": round(seconds, 5),
            "series": {n: _thinned(values[: self.step]) for n, values in self.series.items()},
            "distances": {"before": self.before, "after": distances(self.weights)},
            **provenance(self.device),
            "settings": settings_of(self.cell, self.task),
        }


def _thinned(values: Tensor) -> list[float]:
    """The means of equal parts, at most POINTS."""
    parts = values.double().cpu().tensor_split(min(POINTS, len(values)))
    return [float(f"{part.mean().item():.4g}") for part in parts]


@torch.no_grad()
def distances(weights: list) -> list[float]:
    """How far latent weights are from the nearest transition point: the share of all between 0 and
    half a step, in BINS equal parts. What lies further outside of the grid is in none."""
    counts = torch.zeros(BINS, dtype=torch.float64)
    for weight in weights:
        low, high = weight.quantizer.spec.codes
        scale = weight.quantizer.scale_offset()[0].double()
        u = weight.parameter.double() / _spread(scale, weight.parameter.shape)
        nearest = (u.floor() + 0.5).clamp(low + 0.5, high - 0.5)
        counts += torch.histc((u - nearest).abs().cpu(), BINS, 0, 0.5)
    total = sum(weight.parameter.numel() for weight in weights)
    return [float(f"{count / total:.4g}") for count in counts.tolist()]


def _spread(ranges: Tensor, shape: torch.Size) -> Tensor:
    """A value of each element of a weight of this shape."""
    if ranges.dim() == len(shape):
        for axis, size in enumerate(shape):
            ranges = ranges.repeat_interleave(size // ranges.shape[axis], axis)
    return ranges
